"""Layers with MoRA adapters. Shape suffixes as in operators.py."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import MoraConfig
from .operators import Grouping, Layout, get_operator


class MoraLayer(BaseTunerLayer):
    """What every layer with MoRA adapters has: per adapter a matrix M, its operator and layout, and a dropout."""

    adapter_layer_names = ("mora_M",)
    other_param_names = ("r", "mora_operator", "mora_layout", "mora_dropout")
    fan_in_fan_out: bool  # True where the base layer stores its weight as (in, out)

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.mora_operator: dict[str, str] = {}
        self.mora_layout: dict[str, Layout] = {}
        self.mora_dropout = nn.ModuleDict({})
        self.mora_M = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        self.in_features, self.out_features = _features(self.get_base_layer())

    def update_layer(self, adapter_name: str, r: int, config: MoraConfig, name: str = "layer") -> None:
        """Add an adapter, or make it anew.

        Args:
            r: the equivalent rank of LoRA.
            name: the layer's name, for messages.

        Raises ValueError where M would not fit the layer and `config.cap` is false.
        """
        operator = get_operator(config.operator)
        size = operator.size(self.in_features, self.out_features, r)
        largest = operator.largest_size(self.in_features, self.out_features)
        if not 1 <= size <= largest:
            reason = (
                f"r={r} is too large for {name} ({self.in_features} inputs, {self.out_features} outputs): M would have "
                f"{size} rows, and {largest} fit with operator={config.operator!r}."
            )
            if not config.cap or largest < 1:
                fits = operator.largest_rank(self.in_features, self.out_features)
                advice = f"The largest r that fits is {fits}" if fits else "No r fits"
                raise ValueError(
                    f"{reason} {advice}; other ways: `cap=True` takes the largest M that fits in each layer, "
                    f"`rank_pattern` gives a layer a rank of its own, `exclude_modules` leaves it out."
                )
            warnings.warn(f"{reason} Taking {largest} rows (`cap=True`).", stacklevel=2)
            size = largest

        self.r[adapter_name] = r
        self.mora_operator[adapter_name] = config.operator
        self.mora_layout[adapter_name] = Layout(
            self.in_features, self.out_features, size, config.in_grouping, config.out_grouping
        )
        self.mora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout > 0.0 else nn.Identity()
        self.mora_M[adapter_name] = nn.Parameter(torch.empty(size, size))
        self.reset_mora_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_mora_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """M to zero, or, with `init_weights=False`, to uniform values of at most 1 / sqrt(R)."""
        if init_weights:
            nn.init.zeros_(self.mora_M[adapter_name])
        else:
            nn.init.kaiming_uniform_(self.mora_M[adapter_name], a=math.sqrt(5))

    def set_grouping(self, adapter_name: str, in_grouping: Grouping, out_grouping: Grouping) -> None:
        """Change sharing's groups of a live adapter, as ReMoRA does after each merge (paper, section 4).

        Raises ValueError where the adapter's operator has no groups, or is merged (it could not be unmerged).
        """
        if self.mora_operator[adapter_name] != "sharing":
            raise ValueError(f"operator={self.mora_operator[adapter_name]!r} has no groups; only 'sharing' has.")
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is merged; unmerge it before its groups change.")
        self.mora_layout[adapter_name] = replace(
            self.mora_layout[adapter_name], in_grouping=in_grouping, out_grouping=out_grouping
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base layer's weight, in the weight's own orientation and M's dtype.

        A D x K matrix, transposed where the layer stores (in, out).
        """
        m_RR = self.mora_M[adapter]
        dtype = m_RR.dtype
        if m_RR.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            m_RR = m_RR.float()  # sums of half precision values lose digits, and some CPUs lack the kernels
        delta_DK = get_operator(self.mora_operator[adapter]).dense(m_RR, self.mora_layout[adapter])
        return transpose(delta_DK.to(dtype), self.fan_in_fan_out)

    def mora_update(self, x_BK: Tensor, adapter: str) -> Tensor:
        """decompress(M compress(dropout(x))): y_BD in the dtype of M (or of autocast)."""
        m_RR = self.mora_M[adapter]
        x_BK = self._cast_input_dtype(x_BK, m_RR.dtype)
        x_BK = self.mora_dropout[adapter](x_BK)
        return get_operator(self.mora_operator[adapter])(x_BK, m_RR, self.mora_layout[adapter])

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError where `adapter_names` does not fit the batch or the state of the layer."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            return
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge` first.")


class Linear(nn.Module, MoraLayer):
    """A Linear or Conv1D layer with MoRA adapters: y = W x + b + decompress(M compress(x))."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoraConfig,
        r: int,
        name: str = "layer",
        fan_in_fan_out: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        MoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config=config, name=name)

    def _base_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.get_base_layer().weight)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weights to the base weight.

        Args:
            safe_merge: work on a copy, and refuse a result that is not finite (ValueError), the base untouched.
            adapter_names: which adapters; default: the active ones.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.mora_M:
                continue
            weight = self._base_weight()
            with gather_params_ctx(weight):
                delta = self.get_delta_weight(adapter).to(weight.dtype)
                if safe_merge:
                    merged = weight.data + delta
                    if not torch.isfinite(merged).all():
                        raise ValueError(
                            f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken"
                        )
                    weight.data = merged
                else:
                    weight.data += delta
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take all merged adapters' weights out of the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.mora_M:
                weight = self._base_weight()
                with gather_params_ctx(weight):
                    weight.data -= self.get_delta_weight(adapter).to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        dtype = result.dtype
        if adapter_names is not None:
            return self._mixed_batch(x, result, adapter_names)
        for adapter in self.active_adapters:
            if adapter in self.mora_M:
                result = result + self.mora_update(x, adapter)
        return result.to(dtype)

    def _mixed_batch(self, x: Tensor, result: Tensor, adapter_names: list[str]) -> Tensor:
        """Each sample with its own adapter; `__base__` is none."""
        for adapter in sorted(set(adapter_names)):
            if adapter in self.mora_M:
                rows = [row for row, name in enumerate(adapter_names) if name == adapter]
                result[rows] += self.mora_update(x[rows], adapter).to(result.dtype)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "mora." + super().__repr__()


def _features(layer: nn.Module) -> tuple[int, int]:
    """(K, D) of a layer that can be adapted; also where ZeRO 3 holds only a shard of its weight."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        in_features, out_features = getattr(layer.weight, "ds_shape", layer.weight.shape)
        return in_features, out_features
    raise TypeError(
        f"MoRA can't adapt a {type(layer).__name__}; it adapts torch.nn.Linear and transformers' Conv1D. "
        f"Leave the module out of `target_modules`, or name it in `exclude_modules`."
    )
