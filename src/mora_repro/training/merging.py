"""Merge and start anew: ReLoRA, ReMoRA, PeriodicLoRA. The function stays as it was; the optimizer restarts."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mora import MoraLayer, MoraModel

from .. import distributed
from ..errors import UserError
from ..spec import RunSpec
from .optimizer import adapter_of, restart_adapters
from .sharded import load_into, state_of_main, written_by_main

ADAPTER = "default"


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer | MoraLayer]:
    """The layers of LoRA or MoRA, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer | MoraLayer)}


def base_weight(layer: BaseTunerLayer) -> Tensor:
    """The weight that a merge changes."""
    return cast(Tensor, layer.get_base_layer().weight)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Of all layers, by name."""
    return {f"{name}.weight": base_weight(layer) for name, layer in adapted_layers(model).items()}


def refuse_no_merge(spec: RunSpec, model: nn.Module) -> None:
    """Raises UserError where a method changes the base and its adapter can't be merged into it."""
    if why := _why_not(model):
        raise UserError(
            f"method={spec.method.name} changes the base, so that its adapter is merged into it: at the latest to save "
            f"it. That takes plain LoRA or MoRA on a base that is not quantised, and {why}. What changes the base is "
            f"method.merge, or method.peft.init_lora_weights"
        )


def _why_not(model: nn.Module) -> str | None:
    layers = adapted_layers(model)
    others = {
        type(layer).__name__
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer | MoraLayer)
    }
    if not layers or others:
        return f"it has {' and '.join(sorted(others)) or 'neither'}"
    if any(getattr(layer, "lora_variant", None) for layer in layers.values()):
        return "it has a variant of LoRA, such as DoRA"
    if any(getattr(layer, "mora_magnitude", None) for layer in layers.values()):
        return "it has DoRA's magnitude"
    if any(any(getattr(layer, "lora_bias", {}).values()) for layer in layers.values()):
        return "its LoRA has biases"
    if any(isinstance(layer, AdaLoraLayer) for layer in layers.values()):
        return "it has AdaLoRA"
    if any(not weight.is_floating_point() for weight in base_weights(model).values()):
        return "its base is quantised"
    return None


class Merging(TrainerCallback):
    """Merges the adapter into the base after every `every`-th optimizer step but the last, and starts it anew.

    Rank 0 computes, the others receive: all have the same weights to the bit. New LoRA matrices are a function of the
    run's seed and of the number of the merge, so that a resumed run draws the same.
    """

    def __init__(self, spec: RunSpec, model: nn.Module):
        assert spec.method.merge is not None
        self.schedule = spec.method.merge
        self.seed = spec.seed
        self.model = model
        self.last: dict[str, Tensor] = {}  # with momentum: what was merged last, on rank 0
        self.masters: dict[str, Tensor] = {}  # fp32 weights on rank 0

    def merges_before(self, step: int) -> int:
        """How many merges there were up to a step."""
        return step // self.schedule.every

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        every, steps = self.schedule.every, state.max_steps
        if every >= steps:
            raise UserError(
                f"method.merge.every={every} comes to no merge in {steps} steps. Merge more often: "
                f"method.merge.every={max(2, steps // 4)} method.merge.restart_warmup={max(1, steps // 40)}"
            )
        distributed.say(f"merges after every {every} of {steps} steps: {(steps - 1) // every} in all")
        self._choose_grouping(self.merges_before(state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.schedule.every == 0 and state.global_step < state.max_steps:
            number = self.merges_before(state.global_step)
            self.merge(number)
            optimizer = kwargs["optimizer"].optimizer  # of accelerate's wrapper
            restart_adapters(optimizer)

    def merge(self, number: int) -> None:
        """Add every layer's update to its weight, and start the adapter anew as that of merge `number`."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(hash_of(self.seed, number))
            for name, layer in adapted_layers(self.model).items():
                weight = base_weight(layer)
                with written_by_main([weight, *adapter_of(layer)]):
                    if distributed.is_main():
                        self._add(name, weight, _delta(layer))
                        _start_anew(layer)
        self._choose_grouping(number)

    def _add(self, name: str, weight: Tensor, delta: Tensor) -> None:
        if momentum := self.schedule.momentum:
            last = self.last.get(name)
            delta = (1 - momentum) * delta + (0 if last is None else momentum * last.to(delta.device))
            self.last[name] = delta.cpu()
        if self.schedule.fp32_master and weight.dtype != torch.float32:
            if name not in self.masters:
                self.masters[name] = weight.detach().cpu().float()
            self.masters[name] += delta.cpu().float()
            weight.copy_(self.masters[name])
        else:
            weight.copy_(weight.float() + delta.float())  # rounded once

    def _choose_grouping(self, number: int) -> None:
        if groupings := self.schedule.groupings:
            tuner = self.model.base_model if isinstance(self.model, PeftModel) else None
            if not isinstance(tuner, MoraModel):
                raise UserError("method.merge.groupings are MoRA's; leave them out: method.merge.groupings=[]")
            tuner.set_grouping(ADAPTER, *groupings[number % len(groupings)])

    def state(self) -> dict[str, dict[str, Tensor]]:
        """On rank 0, what a checkpoint needs beside the adapter: the changed base, momentum and masters."""
        return {"base": state_of_main(base_weights(self.model)), "momentum": self.last, "masters": self.masters}

    def load_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """What `state` gave, on rank 0; empty dictionaries on the others."""
        load_into(base_weights(self.model), state["base"])
        self.last, self.masters = state["momentum"], state["masters"]


def merge_for_good(model: nn.Module) -> None:
    """Add every LoRA's or MoRA's update to its weight, for saving; the adapter is not to be used afterwards."""
    for layer in adapted_layers(model).values():
        weight = base_weight(layer)
        with written_by_main([weight, *adapter_of(layer)]), torch.no_grad():
            if distributed.is_main():
                weight.copy_(weight.float() + _delta(layer).float())


def hash_of(seed: int, number: int) -> int:
    """A seed for a merge's new matrices."""
    return (seed * 1_000_003 + number) % 2**63


def _delta(layer: LoraLayer | MoraLayer) -> Tensor:
    return cast(Any, layer).get_delta_weight(ADAPTER)  # of the classes for linear layers, not of LoraLayer


def _start_anew(layer: LoraLayer | MoraLayer) -> None:
    if isinstance(layer, MoraLayer):
        layer.reset_mora_parameters(ADAPTER)
    else:
        layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)
