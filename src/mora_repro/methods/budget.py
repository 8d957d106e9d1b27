"""The own size of a method whose parameters are not those of a LoRA of the same rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import ceil
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError

AS_LORA = "as_lora"  # in a method's YAML, as the value of the argument that is to be chosen

# Trained parameters of one adapted layer of k inputs and d outputs, by the config class and its size n.
PARAMETERS: dict[str, Callable[[int, int, int], int]] = {
    "mora_repro.methods.houlsby.HoulsbyConfig": lambda n, k, d: 2 * d * n + n + d,
    "peft.MissConfig": lambda n, k, d: n * d,
    "peft.RandLoraConfig": lambda n, k, d: ceil(min(k, d) / n) * (n + min(k, d)),
}


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers by name, without the output layer: PEFT's all-linear."""
    head = model.get_output_embeddings()
    return {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }


def with_own_size(arguments: dict[str, Any], r: int, model: PreTrainedModel) -> dict[str, Any]:
    """PEFT arguments whose `as_lora` is replaced by the size nearest in parameters to a LoRA of rank r.

    That LoRA is one of all linear layers where the method stands behind some of them only (Houlsby's adapters), else
    one of the method's own layers. Raises UserError for a config class whose parameters are not known here.
    """
    if AS_LORA not in arguments.values():
        return arguments
    target = arguments["_target_"]
    if target not in PARAMETERS:
        raise UserError(f"{AS_LORA} is known for {', '.join(PARAMETERS)} alone, not for {target}: give a number.")
    layers = linear_layers(model)
    wanted = arguments.get("target_modules")
    own = {name: shape for name, shape in layers.items() if wanted == "all-linear" or _matches(name, wanted)}
    lora = own if wanted == "all-linear" or "Houlsby" not in target else layers
    budget = r * sum(k + d for k, d in lora.values())
    shapes = Counter(own.values())

    def distance(size: int) -> int:
        return abs(sum(PARAMETERS[target](size, *shape) * times for shape, times in shapes.items()) - budget)

    largest = max((min(shape) for shape in shapes), default=1)
    size = min(range(1, largest + 1), key=distance)
    return {key: size if value == AS_LORA else value for key, value in arguments.items()}


def _matches(name: str, wanted: Any) -> bool:
    """PEFT's rule for a list of names; for all else (it refuses what it can't find) no layer is found."""
    return isinstance(wanted, list) and any(name == each or name.endswith(f".{each}") for each in wanted)
