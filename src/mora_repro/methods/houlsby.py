"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751) as a PEFT tuner.

Importing this module registers it in PEFT. Shape suffixes: B any number of leading axes, D a layer's outputs, N the
bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from mora.config import add_peft_type

PEFT_TYPE = "HOULSBY"
add_peft_type(PEFT_TYPE)


@dataclass
class HoulsbyConfig(PeftConfig):
    """Configuration of a [`HoulsbyModel`]. Raises ValueError: a bottleneck below 1."""

    bottleneck: int = field(default=64, metadata={"help": "The width between the two projections."})
    target_modules: list[str] | str | None = field(
        default_factory=lambda: ["o_proj", "down_proj"],
        metadata={
            "help": (
                "The linear layers after which an adapter stands. The default is the paper's place in a LLaMA: after "
                "attention and after the feed-forward, before the sum with the residual."
            )
        },
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole, and to save with the adapters."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_TYPE]
        if not isinstance(self.bottleneck, int) or self.bottleneck < 1:
            raise ValueError(f"`bottleneck` should be a positive width, got {self.bottleneck!r}.")
        for name in ("target_modules", "exclude_modules"):  # PEFT's convention
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))


class HoulsbyLayer(BaseTunerLayer):
    """What PEFT asks of a layer with adapters; merging is refused."""

    adapter_layer_names = ("houlsby_down", "houlsby_up")
    other_param_names = ()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError: an adapter is no change of a weight."""
        raise ValueError(
            "Houlsby adapters can't be merged: they are not linear (there is an activation between their two "
            "projections), so no weight computes the same. Keep the adapter beside the base model."
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class Linear(nn.Module, HoulsbyLayer):
    """A linear layer with an adapter behind it: y + up(gelu(down(y))), where y is the layer's output."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: HoulsbyConfig) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"A Houlsby adapter stands behind a torch.nn.Linear, got {type(base_layer).__name__}.")
        self.base_layer = base_layer
        self.houlsby_down = nn.ModuleDict({})
        self.houlsby_up = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: HoulsbyConfig) -> None:
        """Add an adapter. `up` starts at zero, so that the model's function is unchanged."""
        features = cast(nn.Linear, self.get_base_layer()).out_features
        down, up = nn.Linear(features, config.bottleneck), nn.Linear(config.bottleneck, features)
        # The paper's near-identity start, whose variance is 1e-4; biases of zero.
        nn.init.trunc_normal_(down.weight, std=1e-2, a=-2e-2, b=2e-2)
        for parameter in (down.bias, up.weight, up.bias):
            nn.init.zeros_(parameter)
        self.houlsby_down[adapter_name], self.houlsby_up[adapter_name] = down, up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y_BD = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y_BD
        dtype = y_BD.dtype
        for adapter in self.active_adapters:
            if adapter in self.houlsby_down:
                down, up = self.houlsby_down[adapter], self.houlsby_up[adapter]
                h_BN = torch.nn.functional.gelu(down(y_BD.to(down.weight.dtype)))
                y_BD = y_BD + up(h_BN)
        return y_BD.to(dtype)

    def __repr__(self) -> str:
        return "houlsby." + super().__repr__()


class HoulsbyModel(BaseTuner):
    """Puts adapters into a model; made by `get_peft_model(model, HoulsbyConfig(...))`."""

    prefix: str = "houlsby_"
    tuner_layer_cls = HoulsbyLayer

    def _create_and_replace(  # type: ignore[override]  # narrower: only ever called with its own config
        self,
        houlsby_config: HoulsbyConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, Linear):
            target.update_layer(adapter_name, houlsby_config)
            return
        layer = Linear(target, adapter_name, houlsby_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is trained only once it is made active
        self._replace_module(parent, target_name, layer, target)


if PeftType[PEFT_TYPE] not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=HoulsbyConfig, model_cls=HoulsbyModel)
