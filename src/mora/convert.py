"""Convert checkpoints of the authors' code: `python -m mora.convert IN OUT`.

The authors' code is a fork of PEFT in which a LoraConfig carries `use_mora` and `mora_type`, and M is stored as
`lora_A` and again as `lora_B`; `lora_alpha` is in the configuration, and not used. An adapter that this module writes
computes the same function. The sizes of M are checked when the adapter is loaded, where the model is known.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import MoraConfig
from .operators import Grouping

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"

# The authors' mora_type: operator, and sharing's groups on the input and the output side.
MORA_TYPES: dict[int, tuple[str, Grouping, Grouping]] = {
    1: ("sharing", "strided", "strided"),
    2: ("sharing", "blocked", "blocked"),
    3: ("sharing", "blocked", "strided"),
    4: ("sharing", "strided", "blocked"),
    6: ("rotation", "strided", "strided"),
}

# Fields that mean the same in both.
_KEPT = (
    "r",
    "target_modules",
    "exclude_modules",
    "fan_in_fan_out",
    "modules_to_save",
    "layers_to_transform",
    "rank_pattern",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)


class ConversionError(ValueError):
    """The folder is no MoRA checkpoint of the authors' code, or holds what can't be converted."""


def convert(source: str | Path, target: str | Path) -> MoraConfig:
    """Write the adapter in `source` to the new folder `target` in this package's format.

    Nothing is left in `target` where the conversion fails.

    Raises ConversionError: what is missing, unknown, or contradicts itself.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} exists already; name a new folder.")
    config = convert_config(_read_config(source))
    state = convert_state_dict(_read_weights(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        beside.chmod(0o755)
        config.save_pretrained(str(beside))
        save_file(state, beside / WEIGHTS_NAME, metadata={"format": "pt"})
        if target.exists():
            target.rmdir()
        os.replace(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return config


def convert_config(values: dict[str, Any]) -> MoraConfig:
    """The authors' adapter_config.json as a MoraConfig. Raises ConversionError."""
    if not values.get("use_mora"):
        raise ConversionError("this is no MoRA adapter of the authors' code: its configuration has no use_mora=true.")
    mora_type = values.get("mora_type", 1)  # their default
    if type(mora_type) is not int or mora_type not in MORA_TYPES:
        known = ", ".join(f"{number} ({names[0]})" for number, names in MORA_TYPES.items())
        raise ConversionError(f"mora_type={mora_type!r} is unknown; known types: {known}.")
    for key, plain in (("bias", "none"), ("use_dora", False), ("layer_replication", None)):
        if (values.get(key) or plain) != plain:
            raise ConversionError(f"{key}={values[key]!r} has no counterpart; only {key}={plain!r} can be converted.")
    operator, in_grouping, out_grouping = MORA_TYPES[mora_type]
    kept = {key: values[key] for key in _KEPT if values.get(key) is not None}
    if values.get("layers_to_transform") is not None and values.get("layers_pattern"):
        kept["layers_pattern"] = values["layers_pattern"]
    try:
        return MoraConfig(
            operator=operator,
            in_grouping=in_grouping,
            out_grouping=out_grouping,
            dropout=values.get("lora_dropout") or 0.0,
            **kept,
        )
    except (TypeError, ValueError, AttributeError) as error:  # a value of another kind than the field takes
        raise ConversionError(f"the configuration is not valid: {error}") from error


def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' weights under this package's names; what is no MoRA weight (modules_to_save) stays.

    Raises ConversionError: an M that is not square, or whose two copies differ; weights of LoRA that are no M.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for copy in (".lora_A.weight", ".lora_B.weight"):
            if not name.endswith(copy):
                continue
            module = name.removesuffix(copy)
            if tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1]:
                raise ConversionError(f"{name} is {tuple(tensor.shape)}, and M is square: this is a LoRA adapter.")
            key = f"{module}.mora_M"
            if key in converted and not torch.equal(converted[key], tensor):
                raise ConversionError(f"{module}.lora_A and lora_B differ, and should both be M.")
            converted[key] = tensor.contiguous().clone()
            break
        else:
            if ".lora_" in name:
                raise ConversionError(f"{name} has no counterpart; only lora_A and lora_B of linear layers have.")
            converted[name] = tensor.contiguous().clone()
    if not any(key.endswith(".mora_M") for key in converted):
        raise ConversionError("the weights hold no lora_A and no lora_B.")
    return converted


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ConversionError(f"{folder} has no {CONFIG_NAME}; name the folder that save_pretrained wrote.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no text
        raise ConversionError(f"{path} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path} holds a {type(values).__name__}, and should hold an object.")
    return values


def _read_weights(folder: Path) -> dict[str, Tensor]:
    safe, pickled = folder / WEIGHTS_NAME, folder / PICKLED_NAME
    if not safe.is_file() and not pickled.is_file():
        raise ConversionError(f"{folder} has neither {WEIGHTS_NAME} nor {PICKLED_NAME}.")
    try:
        state = load_file(safe) if safe.is_file() else torch.load(pickled, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{pickled} is damaged, or holds more than tensors; it is not loaded.") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(f"the weights in {folder} can't be read: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ConversionError(f"{pickled} holds something else than a dictionary of tensors.")
    return state


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 where the error's one line is on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m mora.convert",
        description="Convert a MoRA adapter of the authors' code (mora_type 1, 2, 3, 4, 6) to this package's.",
    )
    parser.add_argument("source", metavar="IN", help="folder with adapter_config.json and the weights")
    parser.add_argument("target", metavar="OUT", help="new folder for the converted adapter")
    arguments = parser.parse_args(argv)
    try:
        config = convert(arguments.source, arguments.target)
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.target}: MoRA r={config.r}, operator={config.operator}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
