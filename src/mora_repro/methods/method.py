"""The method on top of a base model: any PEFT config, or none (all weights trained)."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, cast

import hydra.utils
import torch
from hydra.errors import InstantiationException
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

import mora  # noqa: F401  registers MORA in PEFT

from ..errors import UserError, did_you_mean
from ..spec import RunSpec
from . import houlsby  # noqa: F401  registers HOULSBY in PEFT
from .adalora import schedule
from .budget import linear_layers, with_own_size

# Initialisations of LoRA that take what A and B start with out of the frozen weight.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def apply_method(model: PreTrainedModel, spec: RunSpec, steps: int | None = None) -> nn.Module:
    """Wrap `model` for the spec's method; only what the method trains requires a gradient.

    Initialisation is a function of the seed. A model on the meta device gets an adapter there, whatever the method's
    initialisation, so that it can be counted.

    Args:
        steps: optimizer steps of the run, which AdaLoRA's schedule follows; None where nothing is trained.

    Raises UserError where PEFT refuses the configuration, or a layer is too small for r.
    """
    if spec.method.peft is None:
        return model.requires_grad_(True)
    torch.manual_seed(spec.seed)
    layers = linear_layers(model)
    config = _config(model, spec, steps)
    _refuse_checkpointing(config, spec)
    try:
        with torch.device("meta") if model.device.type == "meta" else nullcontext():
            # ZeRO keeps fp32 masters itself, and takes one dtype for all.
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=spec.trainer.stage == 0)
            _set_apart(wrapped, spec)
    except (TypeError, ValueError) as error:
        raise _refused(spec, error, list(layers)) from error
    _check_rank(wrapped, config, spec)
    return wrapped


def changes_base(spec: RunSpec) -> bool:
    """Whether the method alters the base's weights, so that an adapter alone would not be the trained model."""
    start = (spec.method.peft or {}).get("init_lora_weights")
    return spec.method.merge is not None or (isinstance(start, str) and start.lower().startswith(CHANGES_BASE))


def _config(model: PreTrainedModel, spec: RunSpec, steps: int | None) -> PeftConfig:
    """The PEFT config that the spec names, with what depends on the model and on the number of steps."""
    arguments = cast(dict[str, Any], spec.method.peft)
    if spec.r is not None:
        arguments = with_own_size(arguments, spec.r, model)
    if arguments["_target_"].endswith("AdaLoraConfig"):
        arguments = {**schedule(steps), **arguments}
    try:
        config = hydra.utils.instantiate(arguments, _convert_="all")
    except InstantiationException as error:
        raise _refused(spec, error.__cause__ or error) from error
    if not isinstance(config, PeftConfig):
        raise UserError(f"method.peft._target_={arguments['_target_']} is no PEFT config class.")
    if (
        also := spec.training.also_trained
    ):  # a field of every config of PEFT's methods, though not of their common class
        beside = cast(Any, config)
        beside.modules_to_save = sorted({*(beside.modules_to_save or ()), *also})
    return config


def _set_apart(model: nn.Module, spec: RunSpec) -> None:
    """What of the adapter starts as an orthogonal matrix, and what of it is not trained."""
    for key in spec.method.orthogonal:
        for parameter in _named(model, key, "orthogonal", spec):
            with torch.no_grad():  # in fp32, since its decomposition has no other form
                parameter.copy_(nn.init.orthogonal_(torch.empty_like(parameter, dtype=torch.float32)))
    for key in spec.method.frozen:
        for parameter in _named(model, key, "frozen", spec):
            parameter.requires_grad_(False)


def _named(model: nn.Module, key: str, field: str, spec: RunSpec) -> list[nn.Parameter]:
    """The adapter's parameters whose name contains `key`. Raises UserError where there are none."""
    adapter = {
        f"{name}.{own}": (own.split(".")[0], parameter)
        for name, layer in _adapted(model)
        for own, parameter in layer.named_parameters()
        if not own.startswith("base_layer.")
    }
    found = [parameter for name, (_, parameter) in adapter.items() if key in name]
    if not found:
        parts = sorted({part for part, _ in adapter.values()})
        raise UserError(
            f"method.{field}=[{key}]: no parameter of the adapter has {key!r} in its name."
            f"{did_you_mean(key, parts)} There are: {', '.join(parts)}."
        )
    return found


def _check_rank(model: nn.Module, config: PeftConfig, spec: RunSpec) -> None:
    """An error, or at scale mini a warning, where r is above what the rank of an adapted layer's weight can be.

    Of the methods whose r is the rank of two factors; MoRA has such a check of its own.
    """
    if spec.r is None or not isinstance(config, LoraConfig | HiraConfig):
        return
    sides = {
        name.removeprefix("base_model.model."): min(cast(int, layer.in_features), cast(int, layer.out_features))
        for name, layer in _adapted(model)
    }
    small = [name for name, side in sides.items() if side < spec.r]
    if not small:
        return
    others = f" and {len(small) - 1} more" if len(small) > 1 else ""
    said = f"r={spec.r} is above the size of {small[0]} ({sides[small[0]]}){others}"
    if spec.scale == "paper":
        raise UserError(
            f"method={spec.method.name}: {said}, and the rank of an update can't be higher than that. The largest "
            f"that can: r={min(sides.values())}"
        )
    warnings.warn(f"{said}: the update's rank stays below r there, though not its parameters.", stacklevel=3)


def _adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that have an adapter, by name."""
    layers = model.named_modules()  # BaseTunerLayer is a mixin and no nn.Module
    return [(name, cast(nn.Module, layer)) for name, layer in layers if isinstance(layer, BaseTunerLayer)]


def _refuse_checkpointing(config: PeftConfig, spec: RunSpec) -> None:
    if spec.trainer.gradient_checkpointing and config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        raise UserError(
            f"method={spec.method.name} hands keys and values on in the cache, which gradient checkpointing does "
            f"without. Switch it off: trainer.gradient_checkpointing=false"
        )


def _refused(spec: RunSpec, error: BaseException, layers: list[str] | None = None) -> UserError:
    """PEFT's words; where they do not name the argument (a TypeError's don't), all arguments; and the layers, where
    it finds none of those that were named."""
    given = ", ".join(f"{key}={value!r}" for key, value in (spec.method.peft or {}).items() if key != "_target_")
    where = f" (method.peft: {given})" if isinstance(error, TypeError) else ""
    if layers and "not found in the base model" in str(error):
        kinds = ", ".join(dict.fromkeys(name.split(".")[-1] for name in layers))
        where = f" Its linear layers: {kinds}; all of them: method.peft.target_modules=all-linear"
    return UserError(f"method={spec.method.name}: {error}{where}")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    # Of a parameter that ZeRO 3 has sharded, `ds_numel` is the whole's.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
