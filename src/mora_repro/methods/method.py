"""The method on top of a base model: any PEFT config, or none (all weights trained)."""

from __future__ import annotations

import hydra.utils
import torch
from hydra.errors import InstantiationException
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import mora  # noqa: F401  registers MORA in PEFT

from ..errors import UserError
from ..spec import RunSpec


def apply_method(model: PreTrainedModel, spec: RunSpec) -> nn.Module:
    """Wrap `model` for the spec's method; only what the method trains requires a gradient.

    Initialisation is a function of the seed. Raises UserError where PEFT refuses the configuration.
    """
    if spec.method.peft is None:
        return model.requires_grad_(True)
    torch.manual_seed(spec.seed)
    try:
        config = hydra.utils.instantiate(spec.method.peft, _convert_="all")
    except InstantiationException as error:
        raise _refused(spec, error.__cause__ or error) from error
    if not isinstance(config, PeftConfig):
        raise UserError(f"method.peft._target_={spec.method.peft['_target_']} is no PEFT config class.")
    try:
        return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise _refused(spec, error) from error


def _refused(spec: RunSpec, error: BaseException) -> UserError:
    """PEFT's words, and where they do not name the argument (a TypeError's don't), all arguments."""
    given = ", ".join(f"{key}={value!r}" for key, value in (spec.method.peft or {}).items() if key != "_target_")
    where = f" (method.peft: {given})" if isinstance(error, TypeError) else ""
    return UserError(f"method={spec.method.name}: {error}{where}")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    # Of a parameter that ZeRO 3 has sharded, `ds_numel` is the whole's.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def changes_base(spec: RunSpec) -> bool:
    return spec.method.merge is not None
