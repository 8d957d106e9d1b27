"""Layers with MoRA adapters. Shape suffixes as in operators.py."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .config import MoraConfig
from .operators import Grouping, Layout, get_operator


class MoraLayer(BaseTunerLayer):
    """What every layer with MoRA adapters has: per adapter a matrix M, its operator and layout, and a dropout."""

    adapter_layer_names = ("mora_M",)
    other_param_names = ("r", "mora_operator", "mora_layout", "mora_dropout")
    fan_in_fan_out: bool  # True where the base layer stores its weight as (in, out)

    def __init__(self, base_layer: nn.Module, name: str = "layer", **kwargs: Any) -> None:
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
        base_layer = self.get_base_layer()
        # Reads and writes the weight of a quantised layer; None for a plain one.
        self.quantization_backend = resolve_quantization_backend(
            base_layer, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        if not self._is_supported(base_layer):
            raise TypeError(
                f"MoRA can't adapt {name}, of type {type(base_layer).__name__}; it adapts torch.nn.Linear, PEFT's "
                f"quantised forms of it, and transformers' Conv1D. Leave the module out of `target_modules`, or name "
                f"it in `exclude_modules`."
            )
        # Also where ZeRO 3 or FSDP hold only a shard of the weight.
        self.in_features, self.out_features = cast(tuple[int, int], _get_in_out_features(base_layer))

    def _is_supported(self, base_layer: nn.Module) -> bool:
        if self.quantization_backend is not None:
            return self.quantization_backend.layer_type == "linear"
        # torch.nn.MultiheadAttention reads the weight of its output layer and never calls it.
        return isinstance(base_layer, nn.Linear | Conv1D) and not isinstance(
            base_layer, NonDynamicallyQuantizableLinear
        )

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
        sides = f"{name} ({self.in_features} inputs, {self.out_features} outputs)"
        if largest < 1:
            raise ValueError(
                f"No M fits {sides}: operator={config.operator!r} needs at least 2 inputs and 2 outputs. "
                f"`exclude_modules` leaves the layer out."
            )
        if size > largest and not config.cap:
            fits = operator.largest_rank(self.in_features, self.out_features)
            advice = f"The largest r that fits is {fits}" if fits else "No r fits"
            raise ValueError(
                f"r={r} is too large for {sides}: M would have {size} rows, and {largest} fit with "
                f"operator={config.operator!r}. {advice}; other ways: `cap=True` takes the largest M that fits in "
                f"each layer, `rank_pattern` gives a layer a rank of its own, `exclude_modules` leaves it out."
            )
        size = min(size, largest)

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
        """M to zero, or, with `init_weights=False`, to uniform values of at most 1 / sqrt(R).

        Writes the parameter alone: under DeepSpeed, the optimizer's copy of it has to be written as well.
        """
        if init_weights:
            nn.init.zeros_(self.mora_M[adapter_name])
        else:
            nn.init.kaiming_uniform_(self.mora_M[adapter_name], a=math.sqrt(5))

    def set_grouping(self, adapter_name: str, in_grouping: Grouping, out_grouping: Grouping) -> None:
        """Change sharing's groups of a live adapter in this layer, as ReMoRA does after each merge.

        The adapter's function changes unless M is zero. The configuration is not told: where the adapter is to be
        saved, use [`MoraModel.set_grouping`], which changes all layers and the configuration.

        Raises ValueError where the adapter's operator has no groups, is merged (it could not be unmerged), or a
        grouping is unknown.
        """
        self.mora_layout[adapter_name] = self.check_grouping(adapter_name, in_grouping, out_grouping)

    def check_grouping(self, adapter_name: str, in_grouping: Grouping, out_grouping: Grouping) -> Layout:
        """The layout with these groups; raises ValueError where [`set_grouping`] does, and changes nothing."""
        if self.mora_operator[adapter_name] != "sharing":
            raise ValueError(f"operator={self.mora_operator[adapter_name]!r} has no groups; only 'sharing' has.")
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is merged; unmerge it before its groups change.")
        return replace(self.mora_layout[adapter_name], in_grouping=in_grouping, out_grouping=out_grouping)

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
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )


class Linear(nn.Module, MoraLayer):
    """A Linear (plain or quantised) or Conv1D layer with MoRA adapters: y = W x + b + decompress(M compress(x))."""

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
        MoraLayer.__init__(self, base_layer, name=name, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config=config, name=name)

    def _add_to_base(self, adapter: str, sign: int, check: bool) -> None:
        """Add or subtract an adapter's weight: in the weight's dtype, rounded once; a quantised one quantised anew."""
        base_layer = self.get_base_layer()
        parameters = [self.mora_M[adapter]]
        if self.quantization_backend is None:
            parameters.append(base_layer.weight)
        else:
            _restore_packed_weight(base_layer)
        with torch.no_grad(), gather_params_ctx(parameters):
            weight = self.get_base_weight()
            delta = self.get_delta_weight(adapter)
            # A dequantised weight is a copy already, in a dtype that may be coarser than the sum needs.
            if check or self.quantization_backend is not None:
                changed = (weight + sign * delta).to(weight.dtype)
            else:
                changed = weight.add_(delta, alpha=sign)
            if check and not torch.isfinite(changed).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken. "
                    "The base weights are unchanged."
                )
            self.set_base_weight(changed)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weights to the base weight.

        Args:
            safe_merge: work on a copy, and refuse a result that is not finite (ValueError), the base untouched.
            adapter_names: which adapters; default: the active ones.

        Raises TypeError where the base layer is quantised in a way that PEFT can't write back (GPTQ, AWQ and such).
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.mora_M:
                self._add_to_base(adapter, sign=1, check=safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take all merged adapters' weights out of the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.mora_M:
                self._add_to_base(adapter, sign=-1, check=False)

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
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
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
        """True: PEFT's `convert_to_lora` approximates the update, which has a higher rank, by one of LoRA's."""
        return True

    def __repr__(self) -> str:
        return "mora." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def _restore_packed_weight(layer: nn.Module) -> None:
    """Undo what bitsandbytes does to 4-bit weights for inference on a CPU, after which they can't be dequantised."""
    quant_state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        layer.state_dict()  # restores the weight's form in place
