"""Does a run fit into memory? What its weights, gradients and optimizer states take, and what would fit.

Per parameter, in bytes, with AdamW (ZeRO, arXiv 1910.02054, figure 1: 2 + 2 + 12 in mixed precision, of which stage 1
divides the last, stage 2 also the second, stage 3 also the first by the number of processes):

                        frozen    trained: weight  gradient  states (two moments; master weight)
    plain, ddp   fp32   4                  4       4         4 + 4
                 bf16   2                  4       4         4 + 4      trained in fp32 under autocast
    ZeRO         fp32   4                  4       4         4 + 4 + 4  the master weight also where it is the same
                 bf16   2                  2       2         4 + 4 + 4
    offloaded                                                + 4        a second gradient, in fp32

Offloaded, all of it lies in the machine's memory. What DeepSpeed keeps is as measured with version 0.19.

`refuse_what_does_not_fit` looks at these alone: what does not fit by them does not fit, and what fits may still be too
large. `memory` adds what a plan needs, activations and buffers:

**Activations** of a micro-batch of N = b s tokens (b samples of s tokens), after Korthikanti et al. 2022 (arXiv
2205.05198, section 4.1), whose 34 s b h + 5 a s^2 b is a GPT's layer in 16 bits; here a LLaMA's, as transformers
computes it. h is the width, f the MLP's, a the heads' together, A their number, V the vocabulary; e bytes are 2 in bf16
and 4 in fp32. Autograd keeps of a layer:

    two RMSNorms   2 x 4 N h             their input in fp32; where their weights are trained, 2 x e N h more
    q, k, v        e N h                 their input, where a weight or an adapter is trained that needs it
    attention      4 e N a + 4 N A       q, k, v, the output, and a log-sum per head: sdpa keeps no s x s matrix (eager
                                         does: b A s^2 in fp32, and in bf16 once more)
                   e N s                 the mask of padding or of documents, as sdpa makes it of booleans
    gate, up       e N h                 their input, as that of q, k, v
    SwiGLU         3 e N f               gate's output, its SiLU, up's output
    down           e N f                 its input, as that of q, k, v
    adapters                             seen on the meta device (probe.py): dropped inputs, masks, what lies between

Grouped queries have fewer keys and values, which sdpa repeats where there is a mask. With gradient checkpointing
(Chen et al. 2016, arXiv 1604.06174) a layer keeps its input alone, e N h, and one layer at a time all of the above.

**The loss** takes 12 N V: log-probabilities, their gradient and that of the logits, all in fp32. The peak is there, or
where the last layer's backward pass begins.

**Buffers**: DeepSpeed's bucket of gradients (`reduce_bucket_size`, 5e8 values unless the configuration says otherwise),
and under ZeRO 3 the weights that are whole at a time (`stage3_max_live_parameters`, 1e9). What CUDA and the allocator
keep for themselves comes on top.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, Literal

import psutil
import torch
import yaml
from torch import nn

from ..errors import UserError
from ..spec import CONF, RunSpec
from .base import precision
from .method import count_parameters
from .probe import Linear, decoder, linear_modules, probe

Device = Literal["cuda", "cpu"]
MAX_GPUS = 1024
GPU = "GPU memory in each process", "a GPU here has"
MACHINE = "this machine's memory", "it has free"


def bytes_per_process(spec: RunSpec, model: nn.Module, processes: int) -> int:
    """Device memory that a process of a run needs before activations; 0 where all is offloaded.

    Args:
        model: with the method applied; its parameters' numbers and `requires_grad` are read, so that it may be on the
            meta device.
    """
    return 0 if spec.trainer.offload else _bytes(spec, model, processes)


def _bytes(spec: RunSpec, model: nn.Module, processes: int) -> int:
    return sum(_states(spec, model, processes))


def _states(spec: RunSpec, model: nn.Module, processes: int) -> tuple[int, int, int, int]:
    """Bytes of the frozen weights, the trained ones, their gradients and their optimizer's states."""
    trained, total = count_parameters(model)
    stage, bf16 = spec.trainer.stage, precision(spec) == "bf16"
    weight = gradient = 2 if bf16 and stage else 4
    frozen = 2 if bf16 else 4
    states = 8 + (4 if stage else 0) + (4 if spec.trainer.offload else 0)

    def shared(number: int, from_stage: int) -> int:
        return -(-number // processes) if stage >= from_stage else number

    return (
        frozen * shared(total - trained, 3),
        weight * shared(trained, 3),
        gradient * shared(trained, 2),
        states * shared(trained, 1),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of a process's device memory where it takes most. `weights` are those of the model before the method, and
    `adapter` what a method trains beside them; of full training all are `weights`."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


PARTS = (*(part.name for part in fields(Memory)), "total")


def memory(
    spec: RunSpec, model: nn.Module, processes: int, samples: int, length: int, device: Device = "cuda"
) -> Memory:
    """What a process of a run takes in training.

    Args:
        model: with the method applied, on the meta device.
        samples: of a micro-batch.
        length: of the longest sample, in tokens.
        device: where it is computed, since dropout keeps something else on a GPU.
    """
    frozen, trained, gradients, optimizer = _states(spec, model, processes)
    whole = spec.method.peft is None
    parts = {
        "weights": frozen + (trained if whole else 0),
        "adapter": 0 if whole else trained,
        "gradients": gradients,
        "optimizer": optimizer,
    }
    if spec.trainer.offload:
        parts = dict.fromkeys(parts, 0)
    return Memory(
        **parts,
        activations=activations(spec, model, samples, length, device),
        buffers=_buffers(spec, model),
    )


def activations(spec: RunSpec, model: nn.Module, samples: int, length: int, device: Device = "cuda") -> int:
    """Bytes that a micro-batch takes beside the states; arguments as of `memory`."""
    base, config, layers = decoder(model)
    length += (spec.method.peft or {}).get("num_virtual_tokens", 0)
    tokens = samples * length
    bf16, whole = precision(spec) == "bf16", spec.method.peft is None
    value = 2 if bf16 else 4
    # Under autocast, weights that are trained whole are in fp32, and so is what is between the layers.
    between = 4 if whole and not spec.trainer.stage else value
    linears = probes(spec, model, samples, length, device)
    kept = sum(linear.kept for linear in linears.values())
    kept += sum(value * tokens * width for width in _inputs(linears, config))
    kept += _norms(layers[0], tokens, between) + _attention(spec, config, samples, length, value)
    kept += 3 * value * tokens * config.intermediate_size

    trained = [p.numel() for p in base.parameters() if p.requires_grad]
    head = base.get_output_embeddings()
    head_trained = any(p.requires_grad for p in head.parameters())
    gradient = max(trained, default=0) * (2 if bf16 and spec.trainer.stage else 4)
    loss = tokens * (4 * config.hidden_size + 12 * config.vocab_size + value * config.hidden_size * head_trained)
    backward = 2 * tokens * config.hidden_size * between + _transient(linears, config, tokens, value) + gradient
    copies = 0
    if bf16 and whole and not spec.trainer.stage:
        copies = 2 * sum(p.numel() for p in base.parameters() if p.dim() == 2)  # autocast's, of the weights
    if spec.trainer.gradient_checkpointing:
        # In fp32 the input that a layer keeps is its first norm's, which is among what it keeps in its turn.
        inputs = between * tokens * config.hidden_size
        return copies + len(layers) * inputs + max(loss, kept - (inputs if between == 4 else 0) + backward)
    return copies + len(layers) * kept + max(loss, backward)


def probes(spec: RunSpec, model: nn.Module, samples: int, length: int, device: Device = "cuda") -> dict[str, Linear]:
    """The linear layers of a decoder layer on a micro-batch, by name; arguments as of `memory`."""
    dtype = torch.bfloat16 if precision(spec) == "bf16" else torch.float32
    modules = linear_modules(decoder(model)[2][0])
    how = (samples, length, dtype, device == "cuda", spec.trainer.stage == 3)
    return {name: probe(each, name, *how) for name, each in modules.items()}


# Layers that read the same input, which is kept once; and that which attention keeps anyway.
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
KEPT_ANYWAY = "o_proj"


def _inputs(linears: dict[str, Linear], config: Any) -> list[int]:
    """The widths of the linear layers' inputs that are kept."""
    kept = {SAME_INPUT.get(name, name): each.in_features for name, each in linears.items() if each.keeps_input}
    kept.pop(KEPT_ANYWAY, None)
    return list(kept.values())


def _norms(layer: nn.Module, tokens: int, between: int) -> int:
    # PEFT leaves the original beside a norm that is trained, and does not run it.
    used = {name: p for name, p in layer.named_parameters() if "norm" in name and ".original_module." not in name}
    return sum(tokens * p.numel() * (4 + between * p.requires_grad) for p in used.values() if p.dim() == 1)


def _attention(spec: RunSpec, config: Any, samples: int, length: int, value: int) -> int:
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tokens = samples * length
    if spec.trainer.attention == "eager":
        matrix = samples * heads * length**2
        return 4 * value * tokens * width + matrix * (4 + (value if value == 2 else 0))
    if spec.trainer.attention == "flash_attention_2":
        groups = getattr(config, "num_key_value_heads", None) or heads
        return 2 * value * tokens * width * (heads + groups) // heads + 4 * tokens * heads
    return 4 * value * tokens * width + 4 * tokens * heads + value * tokens * length


def _transient(linears: dict[str, Linear], config: Any, tokens: int, value: int) -> int:
    """What lives for a moment in a layer's backward pass: the gradients of SwiGLU's output and of its two factors, when
    that output is let go if it was kept; or what is in a linear layer."""
    within = max(each.extra for each in linears.values())
    gone = any(each.keeps_input and each.in_features == config.intermediate_size for each in linears.values())
    return max((3 - gone) * value * tokens * config.intermediate_size, within)


def _buffers(spec: RunSpec, model: nn.Module) -> int:
    if not spec.trainer.stage:
        return 0
    zero = (spec.trainer.deepspeed or {})["zero_optimization"]
    value = 2 if precision(spec) == "bf16" else 4
    bucket = int(zero.get("reduce_bucket_size", 5e8)) if zero.get("contiguous_gradients", True) else 0
    whole = 0
    if spec.trainer.stage == 3:
        whole = min(count_parameters(model)[1], int(zero.get("stage3_max_live_parameters", 1e9)))
    return value * (bucket + whole)


def needed_gb(spec: RunSpec, model: nn.Module, processes: int) -> float:
    """GB (10^9 bytes) of each GPU, as on GPUs that have bfloat16; for machines that have none."""
    return bytes_per_process(as_on_gpus(spec), model, processes) / 1e9


def as_on_gpus(spec: RunSpec) -> RunSpec:
    """The run as it is on GPUs that have bfloat16, whatever this machine has."""
    if spec.scale == "paper" and spec.trainer.precision is None:
        return _with_trainer(spec, precision="bf16")
    return spec


def refuse_what_does_not_fit(spec: RunSpec, model: nn.Module, processes: int, available: int, device: Device) -> None:
    """Raise UserError where the run does not fit, with what would.

    Args:
        available: bytes; of a GPU, or with device `cpu` of the machine, which all processes share.
    """
    if device == "cpu":
        limits = [(_local(processes) * _bytes(spec, model, processes), available, *MACHINE)]
    else:
        limits = [
            (bytes_per_process(spec, model, processes), available, *GPU),
            (_offloaded(spec, model, processes), psutil.virtual_memory().available, *MACHINE),
        ]
    for need, there, where, has in limits:
        if need > there:
            ways = _trainers(spec, model, processes, available) if device == "cuda" else []
            if device == "cpu" and spec.scale != "mini":
                ways.append(f"python train.py method={spec.method.name} task={spec.task['name']} scale=mini")
            ways.append(_smaller_model(model, there / need))
            raise UserError(
                f"{spec.model.title} with {spec.name} takes {gb(need)} of {where} for weights, gradients and "
                f"optimizer states, before activations (trainer={spec.trainer.name}, {_many(processes)}, "
                f"{precision(spec)}), and {has} {gb(there)}: {gb(need - there)} too little. "
                f"What fits: {'; '.join(ways)}"
            )


def _offloaded(spec: RunSpec, model: nn.Module, processes: int) -> int:
    """Bytes of this machine's memory for what its processes offload."""
    return _local(processes) * _bytes(spec, model, processes) if spec.trainer.offload else 0


def _local(processes: int) -> int:
    """How many of the processes this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def _smaller_model(model: nn.Module, part: float) -> str:
    """The size of a model that takes `part` of the memory, in words."""
    total = count_parameters(model)[1]
    return (
        f"a model of at most {_size(part * total)} parameters (this has {_size(total)}): model=hf model.pretrained=<it>"
    )


def _trainers(spec: RunSpec, model: nn.Module, processes: int, available: int) -> list[str]:
    """The trainers under which it fits with as many GPUs, or else how many GPUs zero3 needs."""
    ways = []
    ram = psutil.virtual_memory().available
    for name in ("zero1", "zero2", "zero3", "zero3_offload"):
        other = under(spec, name)
        if name in spec.method.cannot or name == spec.trainer.name:
            continue
        gpu, offloaded = bytes_per_process(other, model, processes), _offloaded(other, model, processes)
        if gpu <= available and offloaded <= ram:
            takes = f"{gb(offloaded)} of the machine's memory" if other.trainer.offload else f"{gb(gpu)} a GPU"
            ways.append(f"trainer={name} ({takes})")
    if "zero3" not in spec.method.cannot and not any(way.startswith("trainer=zero3 ") for way in ways):
        zero3 = under(spec, "zero3")
        for number in range(processes + 1, MAX_GPUS + 1):
            if (gpu := bytes_per_process(zero3, model, number)) <= available:
                ways.append(f"trainer=zero3 with {number} GPUs or more ({gb(gpu)} each)")
                break
    return ways


def under(spec: RunSpec, trainer: str) -> RunSpec:
    """The same run under another trainer of conf/trainer, as far as memory is concerned."""
    chosen = yaml.safe_load((CONF / "trainer" / f"{trainer}.yaml").read_text())
    stage = chosen.get("stage", 0)
    # What of DeepSpeed's JSON is not about a stage stays.
    deepspeed = {**(spec.trainer.deepspeed or {})}
    deepspeed["zero_optimization"] = {**deepspeed.get("zero_optimization", {}), "stage": stage}
    return _with_trainer(
        spec, name=trainer, stage=stage, offload=chosen.get("offload", False), deepspeed=deepspeed if stage else None
    )


def _with_trainer(spec: RunSpec, **values: object) -> RunSpec:
    return spec.model_copy(update={"trainer": spec.trainer.model_copy(update=values)})


def gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB"


def _size(parameters: float) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"


def _many(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
