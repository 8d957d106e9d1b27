"""Memory and speed of training steps on a GPU, beside the plan: `python benchmarks/gpu_memory.py --out gpu.json`.

A LLaMA of 7 B with random weights, as at scale paper: in bf16, with gradient checkpointing, LoRA, MoRA and DoRA at r=8
and r=256, batches of 8 samples of 512 and of 2,048 tokens, some of them padding, under ZeRO 2 as it is the default
there. It takes some minutes on one H100, no network and no data; `--trainers plain,zero2` takes twice as long. `--tiny`
takes a LLaMA of some hundred thousand parameters, on a CPU too, where memory is not measured: a check of this script.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else asking for GPUs is of no use to forked processes

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from mora_repro.gpus import gpu_called, known_gpus
from mora_repro.methods import apply_method, on_meta_device
from mora_repro.methods.flops import flops
from mora_repro.methods.memory import PARTS, memory
from mora_repro.spec import RunSpec, compose_config

TINY = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
}
STEPS = 2  # that are measured, after one that makes the optimizer's states


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--tiny", action="store_true", help="a small shape, on a CPU too")
    parser.add_argument("--methods", default="lora,mora,dora")
    parser.add_argument("--ranks", default="8,256")
    parser.add_argument("--lengths", default="512,2048")
    parser.add_argument(
        "--trainers", default="zero2", help="zero2, plain (without DeepSpeed), or both; a CPU has plain"
    )
    parser.add_argument("--samples", type=int, default=8, help="of a micro-batch")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not given.tiny:
        print(f"torch {torch.__version__} finds no CUDA device: nothing to measure. A check of this script: --tiny")
        return 0
    warnings.simplefilter("ignore")
    ranks = [1, 2] if given.tiny else [int(r) for r in given.ranks.split(",")]
    lengths = [16, 32] if given.tiny else [int(length) for length in given.lengths.split(",")]
    cases: list[dict[str, Any]] = []
    # A process for each, which leaves nothing on the GPU; forked, so that it need not import everything.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as alone:
        device = alone.apply(device_name)
        print(f"{device}, torch {torch.__version__}", flush=True)
        for trainer in given.trainers.split(",") if cuda else ["plain"]:
            for method in given.methods.split(","):
                for r in ranks:
                    cases += alone.apply(measured, (method, r, trainer, lengths, given.samples, given.tiny))
                    if given.out:  # after each, so that a run that is cut leaves what it had
                        result = {"device": device, "torch": torch.__version__, "samples": given.samples}
                        given.out.write_text(json.dumps({**result, "cases": cases}, indent=1) + "\n")
    return 0


def device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def run_of(method: str, r: int, trainer: str, tiny: bool) -> RunSpec:
    how = [f"method={method}", f"r={r}", "scale=paper", "task=gsm8k", f"trainer={trainer}", "trainer.precision=bf16"]
    if tiny:
        how += ["model=llama_250m", *(f"model.architecture.{key}={value}" for key, value in TINY.items())]
    return RunSpec.from_config(compose_config(how))


def measured(method: str, r: int, trainer: str, lengths: list[int], samples: int, tiny: bool) -> list[dict[str, Any]]:
    """A case for each length, or one with the error that ended them."""
    spec = run_of(method, r, trainer, tiny)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case: dict[str, Any] = {"method": method, "r": r, "trainer": trainer}
    cases = []
    try:
        with device:
            base = AutoModelForCausalLM.from_config(LlamaConfig(**spec.model.architecture), dtype=torch.bfloat16)
        model = apply_method(base, spec).to(device).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        step = stepper(model, spec, device)
        for length in lengths:
            batch = batch_of(samples, length, spec.model.architecture["vocab_size"], device)
            cases.append(case | steps_of(step, batch, spec, samples, length))
            print(shown(cases[-1]), flush=True)
    except Exception as error:
        cases.append(case | {"error": f"{type(error).__name__}: {error}"})
        print(f"{method} r={r} {trainer}: {traceback.format_exc()}", flush=True)
    return cases


def stepper(model: nn.Module, spec: RunSpec, device: torch.device) -> Any:
    """A function that trains a step on a batch, under DeepSpeed or under autocast, as the trainer does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    if not spec.trainer.stage:

        def plain(batch: dict[str, torch.Tensor]) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()

        return plain
    import deepspeed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    config = json.loads(json.dumps(spec.trainer.deepspeed))
    config |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= {"gradient_clipping": 1.0, "bf16": {"enabled": True}}
    deepspeed.init_distributed("nccl", verbose=False)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config)

    def sharded(batch: dict[str, torch.Tensor]) -> None:
        engine.backward(engine(**batch, use_cache=False).loss)
        engine.step()

    return sharded


def batch_of(samples: int, length: int, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (samples, length), device=device)
    mask = torch.ones_like(ids)
    mask[0, -length // 8 :] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def steps_of(step: Any, batch: dict[str, torch.Tensor], spec: RunSpec, samples: int, length: int) -> dict[str, Any]:
    cuda = torch.cuda.is_available()

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    step(batch)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = now()
    for _ in range(STEPS):
        step(batch)
    seconds = (now() - start) / STEPS
    meta = apply_method(on_meta_device(spec), spec)
    planned = memory(spec, meta, 1, samples, length)
    arithmetic = flops(spec, meta, samples, length)
    gpu = gpu_called(device_name(), known_gpus())
    return {
        "length": length,
        "planned": {part: getattr(planned, part) for part in PARTS},
        "measured": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved": torch.cuda.max_memory_reserved() if cuda else None,
        "tokens_per_s": samples * length / seconds,
        "flops": arithmetic.total,
        "recomputed": arithmetic.recomputed,
        "utilisation": arithmetic.total / seconds / (known_gpus()[gpu].tflops * 1e12) if gpu else None,
    }


def shown(case: dict[str, Any]) -> str:
    planned = case["planned"]["total"]
    beside = "memory not measured"
    if case["measured"]:
        ratio, utilisation = planned / case["measured"], case["utilisation"]
        beside = f"measured {case['measured'] / 1e9:.2f} GB, planned / measured {ratio:.3f}"
        beside += f", utilisation {utilisation:.1%}" if utilisation else ""
    return (
        f"{case['trainer']:6} {case['method']:5} r={case['r']:<4} {case['length']:5} tokens: planned "
        f"{planned / 1e9:.2f} GB, {beside}, {case['tokens_per_s']:,.0f} tokens/s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
