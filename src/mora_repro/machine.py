"""What a run needs of the machine: memory, and room on the disk."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import psutil
import torch

from .distributed import from_main, is_main
from .errors import UserError
from .methods import (
    apply_method,
    changes_base,
    computes_in_bf16,
    count_parameters,
    needed_gb,
    on_meta_device,
    refuse_what_does_not_fit,
)
from .results.records import Store
from .spec import RunSpec
from .spec.options import Options


def refuse_this_machine(spec: RunSpec, processes: int) -> None:
    """Raises UserError where the run's scale needs a GPU and there is none, or where it does not fit into memory.

    So does what is wrong with the method, before anything is trained, a base too.
    """
    cuda = torch.cuda.is_available()
    with warnings.catch_warnings(action="ignore"):  # they are shown when the method is applied to the weights
        model = apply_method(on_meta_device(spec), spec)
    if spec.scale == "paper" and not cuda:
        raise UserError(
            f"scale=paper needs a CUDA GPU, and torch {torch.__version__} finds none. {spec.model.title} with "
            f"{spec.name} takes about {needed_gb(spec, model, processes):.0f} GB of GPU memory for weights, gradients "
            f"and optimizer, before activations. What runs here: "
            f"python train.py method={spec.method.name} task={spec.task['name']} scale=mini"
        )
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().available
    refuse_what_does_not_fit(spec, model, processes, memory, "cuda" if cuda else "cpu")


def refuse_full_disk(spec: RunSpec, options: Options, store: Store, work: Path, model: torch.nn.Module) -> None:
    """Raises UserError where the run's checkpoints and weights have no place; the oldest goes when the next is there.

    A checkpoint has what is trained, AdamW's two moments and ZeRO's masters, all in fp32, and after merges the base.
    """
    trainable, total = count_parameters(model)
    whole = total * (2 if computes_in_bf16(spec) and spec.method.peft else 4)
    merge = spec.method.merge
    kept = (whole + 4 * total * (bool(merge.momentum) + merge.fp32_master)) if merge else 0
    checkpoint = 16 * trainable + kept
    final = whole if spec.method.peft is None or changes_base(spec) else 4 * trainable
    there, free = 0, 0
    if is_main():  # which writes; all go on or none
        there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
        free = shutil.disk_usage(store.out).free
    there, free = from_main((there, free))
    need = (options.keep_checkpoints + 1) * checkpoint + final - there
    if free < need:
        raise UserError(
            f"out={store.out} has {free / 1e6:.1f} MB free, and this run's checkpoints and weights take "
            f"{need / 1e6:.1f} MB. Make room, keep fewer (trainer.keep_checkpoints=1), or choose another folder: "
            f"out=<folder>"
        )


def what_takes_less_memory(spec: RunSpec, error: BaseException) -> str:
    micro = spec.training.micro_batch_size or spec.training.batch_size
    tips = [f"training.micro_batch_size={max(1, micro // 2)}"]
    if not spec.trainer.gradient_checkpointing:
        tips.append("trainer.gradient_checkpointing=true")
    if spec.trainer.stage < 3:
        tips.append("trainer=zero3 on several GPUs")
    return f"the GPU's memory is full: {str(error).split('. ')[0]}. Less takes: {', or '.join(tips)}"
