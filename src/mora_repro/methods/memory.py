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

Activations, buffers for communication, and what a library keeps for itself come on top: what does not fit by these
numbers does not fit, and what fits may still be too large.
"""

from __future__ import annotations

import os
from typing import Literal

import psutil
import yaml
from torch import nn

from ..errors import UserError
from ..spec import CONF, RunSpec
from .base import precision
from .method import count_parameters

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
    trained, total = count_parameters(model)
    stage, bf16 = spec.trainer.stage, precision(spec) == "bf16"
    weight = gradient = 2 if bf16 and stage else 4
    frozen = 2 if bf16 else 4
    states = 8 + (4 if stage else 0) + (4 if spec.trainer.offload else 0)

    def shared(number: int, from_stage: int) -> int:
        return -(-number // processes) if stage >= from_stage else number

    weights = frozen * shared(total - trained, 3) + weight * shared(trained, 3)
    return weights + gradient * shared(trained, 2) + states * shared(trained, 1)


def needed_gb(spec: RunSpec, model: nn.Module, processes: int) -> float:
    """GB (10^9 bytes) of each GPU, as on GPUs that have bfloat16; for machines that have none."""
    if spec.scale == "paper" and spec.trainer.precision is None:
        spec = _with_trainer(spec, precision="bf16")
    return bytes_per_process(spec, model, processes) / 1e9


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
                f"{spec.model.title} with {spec.name} takes {_gb(need)} of {where} for weights, gradients and "
                f"optimizer states, before activations (trainer={spec.trainer.name}, {_many(processes)}, "
                f"{precision(spec)}), and {has} {_gb(there)}: {_gb(need - there)} too little. "
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
        other = _under(spec, name)
        if name in spec.method.cannot or name == spec.trainer.name:
            continue
        gpu, offloaded = bytes_per_process(other, model, processes), _offloaded(other, model, processes)
        if gpu <= available and offloaded <= ram:
            takes = f"{_gb(offloaded)} of the machine's memory" if other.trainer.offload else f"{_gb(gpu)} a GPU"
            ways.append(f"trainer={name} ({takes})")
    if "zero3" not in spec.method.cannot and not any(way.startswith("trainer=zero3 ") for way in ways):
        zero3 = _under(spec, "zero3")
        for number in range(processes + 1, MAX_GPUS + 1):
            if (gpu := bytes_per_process(zero3, model, number)) <= available:
                ways.append(f"trainer=zero3 with {number} GPUs or more ({_gb(gpu)} each)")
                break
    return ways


def _under(spec: RunSpec, trainer: str) -> RunSpec:
    """The same run under another trainer of conf/trainer, as far as memory is concerned."""
    chosen = yaml.safe_load((CONF / "trainer" / f"{trainer}.yaml").read_text())
    return _with_trainer(spec, name=trainer, stage=chosen["stage"], offload=chosen.get("offload", False))


def _with_trainer(spec: RunSpec, **values: object) -> RunSpec:
    return spec.model_copy(update={"trainer": spec.trainer.model_copy(update=values)})


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB"


def _size(parameters: float) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"


def _many(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
