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
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode
from transformers.pytorch_utils import Conv1D

from .config import MoraConfig
from .dropout import Mask
from .kernels import add_update, kernel_of, under_autocast, with_base
from .operators import HALF, Grouping, Layout, Operator, get_operator

# Folding passes over the weight twice in a step, and saves two of the adapter's three products. It pays where a
# product of M with the tokens has this many multiplications for each entry of the weight (see docs/performance.md).
FOLD = 96
_KEEP_PRODUCTS = (_CachedTorchDispatchMode, _CachingTorchDispatchMode)  # of selective checkpointing


class MoraLayer(BaseTunerLayer):
    """What every layer with MoRA adapters has: per adapter a matrix M, its operator and layout, and a dropout.

    With `use_dora`, an adapter also has a magnitude m_D: the lengths of the rows of W + delta are set to it.
    """

    adapter_layer_names = ("mora_M", "mora_magnitude")
    other_param_names = ("r", "mora_operator", "mora_layout", "mora_dropout")
    fan_in_fan_out: bool  # True where the base layer stores its weight as (in, out)

    def __init__(self, base_layer: nn.Module, name: str = "layer", **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.mora_operator: dict[str, str] = {}
        self.mora_layout: dict[str, Layout] = {}
        self.mora_dropout = nn.ModuleDict({})
        self.mora_M = nn.ParameterDict({})
        self.mora_magnitude = nn.ParameterDict({})
        self._lengths_before_merge: dict[str, Tensor] = {}
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
        if config.use_dora:
            self.mora_magnitude[adapter_name] = nn.Parameter(torch.empty(self.out_features))
        elif adapter_name in self.mora_magnitude:
            del self.mora_magnitude[adapter_name]
        self.reset_mora_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_mora_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """M to zero, or, with `init_weights=False`, to uniform values of at most 1 / sqrt(R).

        A magnitude to |W + delta|. Writes the parameters alone: under DeepSpeed, the optimizer's copy of them has to be
        written as well.
        """
        if init_weights:
            nn.init.zeros_(self.mora_M[adapter_name])
        else:
            nn.init.kaiming_uniform_(self.mora_M[adapter_name], a=math.sqrt(5))
        if adapter_name in self.mora_magnitude:
            magnitude_D = self.mora_magnitude[adapter_name]
            with gather_params_ctx([cast(nn.Parameter, self.get_base_layer().weight)]):
                weight = self.get_base_weight()
                if not (magnitude_D.is_meta or weight.is_meta):  # without values yet; they are loaded later
                    magnitude_D.copy_(self._lengths(weight, adapter_name))

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

        A D x K matrix, transposed where the layer stores (in, out). With `use_dora` it depends on the weight.
        """
        update = self._update_of_weight(adapter)
        if adapter not in self.mora_magnitude:
            return update
        with gather_params_ctx([cast(nn.Parameter, self.get_base_layer().weight)]):
            weight = self.get_base_weight().to(update)
            if adapter in self.merged_adapters:
                return weight - self._without_magnitude(weight, adapter)
            return self._with_magnitude(weight, adapter, self._lengths(weight, adapter)) - weight

    def _update_of_weight(self, adapter: str) -> Tensor:
        """decompress(M compress(.)) as a matrix, as [`get_delta_weight`] is without `use_dora`."""
        m_RR = self.mora_M[adapter]
        dtype = m_RR.dtype
        if m_RR.device.type == "cpu" and dtype in HALF:
            m_RR = m_RR.float()  # sums of half precision values lose digits, and some CPUs lack the kernels
        delta_DK = get_operator(self.mora_operator[adapter]).dense(m_RR, self.mora_layout[adapter])
        return transpose(delta_DK.to(dtype), self.fan_in_fan_out)

    @torch.no_grad()
    def _lengths(self, weight: Tensor, adapter: str) -> Tensor:
        """|W + delta| of each output, D, in M's dtype; a constant to the gradient, as in DoRA's section 4.3."""
        update = self._update_of_weight(adapter).to(weight.device)
        lengths_D = torch.linalg.vector_norm(transpose(weight.to(update.dtype) + update, self.fan_in_fan_out), dim=1)
        return lengths_D.clamp_min(torch.finfo(lengths_D.dtype).tiny)

    def _row_scale(self, adapter: str, lengths_D: Tensor) -> Tensor:
        """m / |W + delta|, of shape D."""
        return self.mora_magnitude[adapter].to(lengths_D.device) / lengths_D

    def _with_magnitude(self, weight: Tensor, adapter: str, lengths_D: Tensor) -> Tensor:
        """m (W + delta) / |W + delta|."""
        total_DK = transpose(weight + self._update_of_weight(adapter).to(weight.device), self.fan_in_fan_out)
        return transpose(self._row_scale(adapter, lengths_D)[:, None] * total_DK, self.fan_in_fan_out)

    def _without_magnitude(self, weight: Tensor, adapter: str) -> Tensor:
        """W, from the weight that this adapter is merged into."""
        scale_D = self._row_scale(adapter, self._lengths_before_merge[adapter].to(weight.device))
        total_DK = transpose(weight, self.fan_in_fan_out) / scale_D[:, None]
        return transpose(total_DK, self.fan_in_fan_out) - self._update_of_weight(adapter).to(weight.device)

    def refuse_others_beside_magnitude(self, adapters: list[str]) -> None:
        """Raises ValueError where one of several adapters sets the lengths of the weight, which they would share."""
        adapters = [adapter for adapter in adapters if adapter in self.mora_M]
        if len(adapters) > 1 and any(adapter in self.mora_magnitude for adapter in adapters):
            raise ValueError(
                f"Adapters {', '.join(adapters)} can't work at the same time: one with use_dora sets the lengths of "
                f"the whole weight. Make one of them active alone: model.set_adapter({adapters[0]!r})"
            )

    def mora_update(self, x_BK: Tensor, adapter: str) -> Tensor:
        """decompress(M compress(dropout(x))): y_BD in the dtype of M (or of autocast)."""
        x_BK = self._adapter_input(x_BK, adapter)
        return get_operator(self.mora_operator[adapter])(x_BK, self.mora_M[adapter], self.mora_layout[adapter])

    def _adapter_input(self, x_BK: Tensor, adapter: str) -> Tensor:
        return self.mora_dropout[adapter](self._cast_input_dtype(x_BK, self.mora_M[adapter].dtype))

    def _add_update(self, result_BD: Tensor, x_BK: Tensor, adapter: str, in_place: bool) -> Tensor:
        """result + [`mora_update`]; `in_place` allows that result is changed."""
        operator, layout, m_RR = self._parts(adapter)
        if not _has_kernel(operator, layout, x_BK, m_RR):
            return result_BD + self.mora_update(x_BK, adapter)
        if under_autocast(x_BK) and m_RR.dtype != torch.float64:  # as in the products of the pure functions
            dtype = torch.get_autocast_dtype(x_BK.device.type)
            x_BK, m_RR = x_BK.to(dtype), m_RR.to(dtype)
        else:
            x_BK = self._cast_input_dtype(x_BK, m_RR.dtype)
        if not result_BD.dtype == x_BK.dtype == m_RR.dtype:
            return result_BD + operator(self.mora_dropout[adapter](x_BK), m_RR, layout)
        x_BK, mask = self._dropped(x_BK, adapter)
        return add_update(result_BD, x_BK, m_RR, operator, layout, in_place and result_BD.is_contiguous(), mask)

    def _dropped(self, x_BK: Tensor, adapter: str) -> tuple[Tensor, Mask | None]:
        """x after dropout; or x as it is, and the mask that kernels.py drops it by."""
        dropout, operator = self.mora_dropout[adapter], get_operator(self.mora_operator[adapter])
        if _has_mask(dropout, operator, x_BK):
            return x_BK, Mask.drawn(cast(nn.Dropout, dropout).p)
        return dropout(x_BK), None

    def _parts(self, adapter: str) -> tuple[Operator, Layout, Tensor]:
        return get_operator(self.mora_operator[adapter]), self.mora_layout[adapter], self.mora_M[adapter]

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
        parameters = [values[adapter] for values in (self.mora_M, self.mora_magnitude) if adapter in values]
        if self.quantization_backend is None:
            parameters.append(base_layer.weight)
        else:
            _restore_packed_weight(base_layer)
        with torch.no_grad(), gather_params_ctx(parameters):
            weight = self.get_base_weight()
            operator, layout, m_RR = self._parts(adapter)
            lengths_D = None
            if adapter in self.mora_magnitude:
                if sign > 0:
                    lengths_D = self._lengths(weight, adapter)
                    changed = self._with_magnitude(weight, adapter, lengths_D).to(weight.dtype)
                else:
                    changed = self._without_magnitude(weight, adapter).to(weight.dtype)
            # A dequantised weight is a copy already, in a dtype that may be coarser than the sum needs.
            elif check or self.quantization_backend is not None:
                changed = (weight + sign * self.get_delta_weight(adapter)).to(weight.dtype)
            elif m_RR.dtype in HALF:
                changed = weight.add_(self.get_delta_weight(adapter), alpha=sign)
            else:  # without the D x K matrix
                weight_DK = transpose(weight, self.fan_in_fan_out)
                operator.add_to(weight_DK, m_RR, layout, sign, weight_DK)
                changed = weight
            if check and not torch.isfinite(changed).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken. "
                    "The base weights are unchanged."
                )
            self.set_base_weight(changed)
            if lengths_D is not None:
                self._lengths_before_merge[adapter] = lengths_D
            else:
                self._lengths_before_merge.pop(adapter, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weights to the base weight.

        Args:
            safe_merge: work on a copy, and refuse a result that is not finite (ValueError), the base untouched.
            adapter_names: which adapters; default: the active ones.

        Raises TypeError where the base layer is quantised in a way that PEFT can't write back (GPTQ, AWQ and such);
        ValueError for several where one has `use_dora`.
        """
        adapters = check_adapters_to_merge(self, adapter_names)
        self.refuse_others_beside_magnitude([*self.merged_adapters, *adapters])
        for adapter in adapters:
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
        plain = _is_plain(self.base_layer, nn.Linear) and not (args or kwargs)  # nobody else has seen its output
        if plain and adapter_names is None and (adapter := self._joins_base(x)) is not None:
            operator, layout, m_RR = self._parts(adapter)
            base_layer = cast(nn.Linear, self.base_layer)
            # Exact in single precision: the rounding of W + delta is that of the product with W. Where the product
            # rounds its factors to fewer digits, the sum would lose small updates.
            kernel = kernel_of(operator, x)
            many = kernel is not None and _tokens(x) * kernel.products(layout) >= FOLD * base_layer.weight.numel()
            x, mask = self._dropped(x, adapter)
            fold = many and mask is None and _products_are_exact(x.dtype)
            return with_base(x, base_layer.weight, base_layer.bias, m_RR, operator, layout, fold, mask)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        if adapter_names is not None:
            return self._mixed_batch(x, result, adapter_names)
        self.refuse_others_beside_magnitude(self.active_adapters)
        for adapter in self.active_adapters:
            if adapter in self.mora_magnitude:
                result = self._forward_with_magnitude(result, x, adapter)
            elif adapter in self.mora_M:
                result = self._add_update(result, x, adapter, in_place=plain)
        return result.to(dtype)

    def _forward_with_magnitude(self, result_BD: Tensor, x_BK: Tensor, adapter: str) -> Tensor:
        """m / |W + delta| (W x + decompress(M compress(dropout(x)))) + b, from W x + b."""
        # ZeRO 3 gathers parameters of other modules that a forward pass reads.
        bias_D = getattr(self.get_base_layer(), "bias", None)
        scale_D = self._row_scale(adapter, self._lengths(self.get_base_weight(), adapter))
        if bias_D is None:
            return scale_D * self._add_update(result_BD, x_BK, adapter, in_place=False)
        return scale_D * self._add_update(result_BD - bias_D, x_BK, adapter, in_place=True) + bias_D

    def _joins_base(self, x_BK: Tensor) -> str | None:
        """The adapter that can be computed in one function with a plain base: the only active one."""
        adapters = [adapter for adapter in self.active_adapters if adapter in self.mora_M]
        if self.merged or len(adapters) != 1 or adapters[0] in self.mora_magnitude:
            return None
        adapter, base = adapters[0], cast(nn.Linear, self.base_layer)
        operator, layout, m_RR = self._parts(adapter)
        dropout = self.mora_dropout[adapter]
        joins = (
            _has_kernel(operator, layout, x_BK, m_RR, base.weight)  # first: one token of a generation ends here
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
            and (isinstance(dropout, nn.Identity) or not dropout.training or _has_mask(dropout, operator, x_BK))
            and m_RR.dtype == base.weight.dtype == x_BK.dtype
            and not under_autocast(x_BK)
        )
        return adapter if joins else None

    def _mixed_batch(self, x: Tensor, result: Tensor, adapter_names: list[str]) -> Tensor:
        """Each sample with its own adapter; `__base__` is none."""
        for adapter in sorted(set(adapter_names)):
            if adapter in self.mora_magnitude:
                raise ValueError(f"Adapter {adapter!r} has use_dora, and can't work on some samples of a batch alone.")
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


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Of that very kind, so that nothing but its own `forward` happens where it is called."""
    return type(module) is kind and not (
        "forward" in vars(module)  # wrapped, as accelerate does
        or module._forward_hooks
        or module._forward_pre_hooks  # DeepSpeed's ZeRO 3 gathers the weight there
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def _has_mask(dropout: nn.Module, operator: Operator, x_BK: Tensor) -> bool:
    """Whether dropout.py serves for this dropout before an operator that has a kernel."""
    return (
        _is_plain(dropout, nn.Dropout)
        and dropout.training
        and 0 < cast(nn.Dropout, dropout).p < 1
        and (kernel := kernel_of(operator, x_BK)) is not None
        and kernel.drops(x_BK.device)
        # A CUDA graph would keep the seed.
        and not (x_BK.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _tokens(x_BK: Tensor) -> int:
    return x_BK.numel() // x_BK.shape[-1]


def _products_are_exact(dtype: torch.dtype) -> bool:
    """Not where fp32 is multiplied as TF32 or bfloat16, by torch.set_float32_matmul_precision or allow_tf32."""
    if dtype == torch.float64:
        return True
    try:
        return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by PyTorch's newer switches, for each backend
        return False


def _has_kernel(operator: Operator, layout: Layout, x_BK: Tensor, *tensors: Tensor) -> bool:
    """Whether kernels.py serves: a built-in operator, and tokens enough for its work on M to pay.

    Not for tensors of other kinds than plain ones, under torch.func, torch.jit.trace, or a checkpointing that keeps the
    base's product, which is added to. A compiler fuses the pure functions itself.
    """
    return (
        not torch.compiler.is_compiling()  # before the number of tokens, which it would take for fixed
        and not torch.jit.is_tracing()
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in (x_BK, *tensors))
        and (kernel := kernel_of(operator, x_BK)) is not None
        and kernel.pays(_tokens(x_BK), layout, x_BK.dtype)
        and not torch._C._are_functorch_transforms_active()
        and not any(isinstance(mode, _KEEP_PRODUCTS) for mode in _get_current_dispatch_mode_stack())
    )


def _restore_packed_weight(layer: nn.Module) -> None:
    """Undo what bitsandbytes does to 4-bit weights for inference on a CPU, after which they can't be dequantised."""
    quant_state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        layer.state_dict()  # restores the weight's form in place
