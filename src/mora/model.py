"""Which modules of a model get MoRA adapters, and what is done with several adapters at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    get_quantization_kwargs,
)
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import MoraConfig
from .layer import Linear, MoraLayer
from .operators import Grouping, get_operator


class MoraModel(BaseTuner):
    """Adapts a model with MoRA (arXiv 2405.12130); made by `get_peft_model(model, MoraConfig(...))`.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from mora import MoraConfig

        >>> model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
        >>> model = get_peft_model(model, MoraConfig(r=8, target_modules="all-linear"))
        ```
    """

    prefix: str = "mora_"
    tuner_layer_cls = MoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; one warning names the layers that are too small for r, where the configuration caps them."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        capped = []
        for name, layer in model.named_modules():
            if not isinstance(layer, MoraLayer) or adapter_name not in layer.mora_M:
                continue
            operator = get_operator(layer.mora_operator[adapter_name])
            wanted = operator.size(layer.in_features, layer.out_features, layer.r[adapter_name])
            if (size := layer.mora_layout[adapter_name].size) < wanted:
                capped.append(f"{name} (M of {size} instead of {wanted} rows)")
        if capped:
            others = f" and {len(capped) - 1} more" if len(capped) > 1 else ""
            r = cast(MoraConfig, self.peft_config[adapter_name]).r
            warnings.warn(
                f"r={r} is too large for {capped[0]}{others}: there M has the largest "
                f"size that fits (`cap=True`), and fewer parameters than a LoRA of that rank.",
                stacklevel=2,
            )

    def _create_and_replace(  # type: ignore[override]  # narrower: only ever called with its own config
        self,
        mora_config: MoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        pattern = get_pattern_key(list(mora_config.rank_pattern), current_key)
        r = mora_config.rank_pattern.get(pattern, mora_config.r)
        if isinstance(target, MoraLayer):
            target.update_layer(adapter_name, r, config=mora_config, name=current_key)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        stored_transposed = isinstance(base, Conv1D)
        if stored_transposed != mora_config.fan_in_fan_out:
            # The same words for every layer, so that Python shows them once.
            kind = "Conv1D" if stored_transposed else "Linear"
            warnings.warn(f"Taking fan_in_fan_out={stored_transposed}, as layers of type {kind} need.", stacklevel=2)
        layer = Linear(
            target,
            adapter_name,
            config=mora_config,
            r=r,
            name=current_key,
            fan_in_fan_out=stored_transposed,
            **get_quantization_kwargs(self.model),
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is trained only once it is made active
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`model(..., adapter_names=[...])`: each sample of the batch with its own adapter, in evaluation."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, MoraLayer)]
        known = {"__base__", *(name for layer in layers for name in layer.mora_M)}
        if unknown := sorted(set(adapter_names) - known):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

        # Beam search repeats each sample before it reaches the layers, but for those of an encoder.
        beams = kwargs.get("num_beams")
        repeated = [name for name in adapter_names for _ in range(beams if isinstance(beams, int) else 1)]
        encoder = self._encoder()
        single = set() if encoder is None else set(encoder.modules())

        def hand_on(_: nn.Module, args: Any, kwargs: Any, names: list[str]) -> tuple[Any, Any]:
            return args, {**kwargs, "adapter_names": names}

        handles = [
            module.register_forward_pre_hook(
                partial(hand_on, names=list(adapter_names) if module in single else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, MoraLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _encoder(self) -> nn.Module | None:
        """The encoder of an encoder-decoder model; None for all others (transformers gives some models themselves)."""
        get_encoder = getattr(self.model, "get_encoder", None)
        encoder = get_encoder() if callable(get_encoder) else None
        return encoder if isinstance(encoder, nn.Module) and encoder is not self.model else None

    def set_grouping(self, adapter_name: str, in_grouping: Grouping, out_grouping: Grouping) -> None:
        """Change sharing's groups of a live adapter in all layers and in its configuration, so that it can be saved.

        ReMoRA does so after each merge, when M is zero again; with another M the adapter's function changes.

        Raises ValueError where there is no such adapter, its operator has no groups, it is merged, or a grouping is
        unknown; nothing is changed then.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name!r} not found; there are {', '.join(self.peft_config)}.")
        layers = [module for module in self.modules() if isinstance(module, MoraLayer)]
        layers = [layer for layer in layers if adapter_name in layer.mora_M]
        for layer in layers:
            layer.check_grouping(adapter_name, in_grouping, out_grouping)
        for layer in layers:
            layer.set_grouping(adapter_name, in_grouping, out_grouping)
        config = cast(MoraConfig, self.peft_config[adapter_name])
        config.in_grouping, config.out_grouping = in_grouping, out_grouping

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's. Raises ValueError, with no layer changed, for several adapters where one has `use_dora`."""
        self._refuse_to_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As PEFT's. Raises as [`merge_adapter`] does."""
        self._refuse_to_merge(adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _refuse_to_merge(self, adapter_names: list[str] | None) -> None:
        for layer in self.modules():
            if isinstance(layer, MoraLayer):
                wanted = layer.active_adapters if adapter_names is None else adapter_names
                layer.refuse_others_beside_magnitude(list(dict.fromkeys([*layer.merged_adapters, *wanted])))

    def reset_mora_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """M of all layers to zero, or to random values, as [`MoraLayer.reset_mora_parameters`] does."""
        for layer in self.modules():
            if isinstance(layer, MoraLayer) and adapter_name in layer.mora_M:
                layer.reset_mora_parameters(adapter_name, init_weights)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Make a new adapter whose M is the weighted sum of others' M, which is exact: the update is linear in M.

        Args:
            adapters: names of adapters of the same sizes, operator and groups in every layer.
            weights: one factor for each.
            adapter_name: the new adapter's name; nothing happens where it exists.
            combination_type: "linear", the only one.

        Raises ValueError: an unknown adapter, adapters that differ, have `use_dora` or each their own
        `modules_to_save`, another combination type.
        """
        if adapter_name in self.peft_config:
            return
        if combination_type != "linear":
            raise ValueError(f"MoRA combines adapters by combination_type='linear' alone, got {combination_type!r}.")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"One weight for each adapter is needed, got {len(adapters)} and {len(weights)}.")
        if missing := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"Adapter(s) {', '.join(missing)} not found; there are {', '.join(self.peft_config)}.")
        configs = [self.peft_config[name] for name in adapters]
        if any(cast(MoraConfig, config).use_dora for config in configs):
            raise ValueError("Adapters with `use_dora` can't be combined: their update is not linear in M.")
        for key in ("r", "rank_pattern", "operator", "in_grouping", "out_grouping", "cap"):
            if any(getattr(config, key) != getattr(configs[0], key) for config in configs):
                raise ValueError(f"Adapters that are combined need the same `{key}`; these differ.")
        layers = [module for module in self.modules() if isinstance(module, MoraLayer)]
        for layer in layers:
            forms = {(layer.mora_operator[name], layer.mora_layout[name]) for name in adapters if name in layer.mora_M}
            present = [name in layer.mora_M for name in adapters]
            if any(present) and (len(forms) > 1 or not all(present)):
                raise ValueError("Adapters that are combined need the same layers, sizes and groups; these differ.")
        for module in self.modules():
            if isinstance(module, ModulesToSaveWrapper):
                owners = [name for name in adapters if name in module.modules_to_save]
                if len(owners) > 1:
                    raise ValueError(
                        "Cannot add weighted adapters if they target the same module with modules_to_save, as "
                        f"{', '.join(owners)} do: such modules have no weighted sum."
                    )
        self.peft_config[adapter_name] = replace(configs[0], inference_mode=True)
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in layers:
                if adapters[0] not in layer.mora_M:
                    continue
                parameters = [layer.mora_M[name] for name in (*adapters, adapter_name)]
                with gather_params_ctx(parameters):
                    total = sum(weight * m_RR for weight, m_RR in zip(weights, parameters[:-1], strict=True))
                    layer.mora_M[adapter_name].data = total.to(parameters[0].dtype)
                layer.mora_layout[adapter_name] = layer.mora_layout[adapters[0]]
                layer.mora_M[adapter_name].requires_grad_(False)
