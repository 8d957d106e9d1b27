"""AdaLoRA's schedule of ranks, in step with the Trainer, and its state for a checkpoint."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # of each parameter's importance, and of how much that varies
PATTERN = "rank_pattern"


def schedule(steps: int | None) -> dict[str, int]:
    """total_step, tinit and tfinal of a run of that many optimizer steps (None: of any, for a model to be counted).

    The first tenth of the steps has the whole rank, and the last half the final one: about the proportions of the
    paper's runs on GLUE, whose steps depend on the task.
    """
    steps = steps or 10
    return {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 2}


class AllocateRank(TrainerCallback):
    """Lets AdaLoRA see the gradients and set its budget after each optimizer step.

    In `on_optimizer_step` the gradients are there still, and `global_step` counts the steps before this one, as PEFT
    counts them.

    Args:
        parts: the number of losses that a step sums up, of all processes and micro-batches. Each of them is divided by
            the whole batch's tokens, but PEFT adds the penalty for matrices that are not orthogonal to each in full.
    """

    def __init__(self, model: nn.Module, parts: int):
        self.tuner = _tuner(model)
        self.parts = parts

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _config(self.tuner).orth_reg_weight /= self.parts

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _config(self.tuner).orth_reg_weight *= self.parts  # as it is saved

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.tuner.update_and_allocate(state.global_step)


def allocator_state(model: nn.Module) -> dict[str, Tensor]:
    """What the allocation of ranks has learned so far: `<kind>/<parameter>`, and which ranks are left."""
    tuner = _tuner(model)
    state = {f"{kind}/{name}": value for kind in AVERAGES for name, value in getattr(tuner.rankallocator, kind).items()}
    pattern = _config(tuner).rank_pattern or {}
    return state | {f"{PATTERN}/{name}": torch.tensor(kept, dtype=torch.bool) for name, kept in pattern.items()}


def load_allocator_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Set what [`allocator_state`] gave, in a model of the same shapes."""
    tuner = _tuner(model)
    devices = {name: parameter.device for name, parameter in tuner.model.named_parameters()}
    pattern: dict[str, list[bool]] = {}
    tuner.rankallocator.reset_ipt()
    for key, value in state.items():
        kind, name = key.split("/", 1)
        if kind == PATTERN:
            pattern[name] = value.tolist()
            continue
        getattr(tuner.rankallocator, kind)[name] = value.to(devices[name])
        # Written anew at each step; that there is one says that the averages are there.
        tuner.rankallocator.ipt[name] = torch.zeros_like(value, device=devices[name])
    _config(tuner).rank_pattern = pattern or None


def _tuner(model: nn.Module) -> AdaLoraModel:
    return cast(AdaLoraModel, cast(PeftModel, model).base_model)


def _config(tuner: AdaLoraModel) -> AdaLoraConfig:
    return cast(AdaLoraConfig, tuner.peft_config[tuner.trainable_adapter_name])
