"""Checkpoints: written beside and renamed, checked when read, and the trained weights at the end."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import distributed
from ..errors import UserError
from .merging import merge_for_good
from .optimizer import adapter_parameters, trained_parameters
from .sharded import state_of_main, whole

CONTENTS = "contents.json"  # of a checkpoint: its files' sizes, and how many processes wrote them


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, the same on every rank; torn ones are removed.

    Raises UserError where it was made with another number of processes, which can't go on with it.
    """
    found: tuple[Path, int] | None = None
    if distributed.is_main():
        for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
            if (processes := _written_by(path)) is None:
                distributed.say(f"{path} is not whole, and is removed")
                shutil.rmtree(path)
            elif found is None:
                found = path, processes
    found = distributed.from_main(found)
    if found is None:
        return None
    path, processes = found
    if processes != distributed.size():
        raise UserError(
            f"this run was interrupted at step {step_of(path)} with {processes} processes, and {distributed.size()} "
            f"can't go on with its checkpoints. Start it on {processes} again (GPUs, or a launcher's processes), or "
            f"anew with rerun=true"
        )
    return path


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint's folder."""
    return int(path.name.split("-")[1])


def _written_by(checkpoint: Path) -> int | None:
    """The number of processes that wrote a checkpoint; None where it is not whole."""
    try:
        contents = json.loads((checkpoint / CONTENTS).read_text())
        whole_files = all((checkpoint / name).stat().st_size == size for name, size in contents["files"].items())
        return contents["processes"] if whole_files else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def seal(partial: Path, final: Path, keep: int) -> None:
    """On rank 0, once all have written: list the files, put them onto the disk, rename; then remove older ones."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    contents = {
        "processes": distributed.size(),
        "files": {str(path.relative_to(partial)): path.stat().st_size for path in files},
    }
    (partial / CONTENTS).write_text(json.dumps(contents, indent=1))
    for path in (*files, partial / CONTENTS):
        _sync(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(final.parent)
    for path in sorted(final.parent.glob("checkpoint-*"), key=step_of)[:-keep]:
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _own_name(name: str) -> str:
    """A parameter's name in the model without PEFT: of a base layer, or of a copy that was trained in its place."""
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def write_tensors(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """On rank 0: `<folder>/<name>.safetensors` for each dictionary that is not empty."""
    for name, state in tensors.items():
        if state:
            save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")


def read_tensors(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """What `write_tensors` wrote, on rank 0; empty dictionaries for what is not there and on the others."""
    paths = {name: folder / f"{name}.safetensors" for name in names}
    return {name: load_file(path) if distributed.is_main() and path.exists() else {} for name, path in paths.items()}


def save_trained(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, as_a_whole_model: bool) -> None:
    """Write the trained weights to `folder`, beside and renamed: what stands there is whole.

    Args:
        as_a_whole_model: in transformers' format, adapters merged; else an adapter in PEFT's format.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
    if not as_a_whole_model:
        assert isinstance(model, PeftModel)
        with whole(list(trained_parameters(model).values())):
            if distributed.is_main():
                with warnings.catch_warnings():
                    # PEFT takes ranks that AdaLoRA has pruned to zero for shards that were not gathered.
                    warnings.filterwarnings("ignore", message=".*have invalid shape")
                    model.save_pretrained(str(partial))
    else:
        base = model
        if isinstance(model, PeftModel):
            merge_for_good(model)
            base = model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        adapters = adapter_parameters(base)
        parameters = {
            _own_name(name): parameter
            for name, parameter in base.named_parameters()
            if name not in adapters and ".original_module." not in name
        }
        state = state_of_main(parameters)
        if distributed.is_main():
            base.save_pretrained(partial, state_dict=state)
    if distributed.is_main():
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    distributed.barrier()
