"""AdamW's parameter groups and the schedule of their rate; and how a group starts anew, under every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..errors import UserError
from ..spec.run_spec import Merge, Method, Training


def adapter_of(layer: BaseTunerLayer) -> list[nn.Parameter]:
    """The parameters that a PEFT tuner added to one layer."""
    parts = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    return [parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a PEFT tuner added, by name, trained or not."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    added = {id(parameter) for layer in layers for parameter in adapter_of(layer)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in added}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, and what of an adapter it leaves, by name."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | adapter_parameters(model)


def parameter_groups(
    model: nn.Module, method: Method, lr: float, training: Training, decayed: list[str]
) -> list[dict[str, Any]]:
    """Groups for AdamW: adapters apart from the rest, so that ZeRO, which keeps one state per group, can reset them.

    Args:
        lr: of all but what `method.lr_factors` name, and what is trained beside the adapter; it comes first, so that
            it is the rate that is logged.
        decayed: names of the parameters that decay (no biases, no norms).

    Raises UserError: a key of `lr_factors` that no trained parameter's name contains.
    """
    adapters = adapter_parameters(model)
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for key in method.lr_factors:
        if not any(key in name for name in trained):
            parts = sorted({part for name in adapters for part in name.split(".")[-3:] if "_" in part})
            raise UserError(
                f"method.lr_factors names {key!r}, and no trained parameter's name contains it. "
                f"Parts of names that there are: {', '.join(parts) or 'none of an adapter'}"
            )
    factors = {**method.lr_factors, ".modules_to_save.": training.also_trained_lr_factor}
    for name, parameter in trained.items():
        factor = next((factor for key, factor in factors.items() if key in name), 1.0)
        groups.setdefault((factor, name in decayed, name in adapters), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * factor,
            "weight_decay": training.weight_decay if decays else 0.0,
            "adapter": adapter,
        }
        for (factor, decays, adapter), parameters in sorted(
            groups.items(), key=lambda item: (item[0][0] != 1.0, not item[0][2])
        )
    ]


def with_restarts(schedule: LambdaLR, merge: Merge) -> LambdaLR:
    """ReLoRA's jagged schedule (arXiv 2307.05695, section 3): after each merge the rate climbs from zero.

    In `merge.restart_warmup` steps it reaches the value that the schedule has where the climb ends.
    """

    def jagged(factor: Callable[[int], float]) -> Callable[[int], float]:
        def at(step: int) -> float:
            since = step % merge.every
            if step < merge.every or since >= merge.restart_warmup:
                return factor(step)
            return factor(step - since + merge.restart_warmup) * since / merge.restart_warmup

        return at

    return LambdaLR(schedule.optimizer, [jagged(factor) for factor in schedule.lr_lambdas])


def restart_adapters(optimizer: Any) -> None:
    """After adapters were given new values: masters equal to them, moments and step count zero; the rest untouched.

    Args:
        optimizer: of torch, or DeepSpeed's of ZeRO 1, 2 or 3, with the groups of `parameter_groups`.

    Under ZeRO an optimizer keeps flat fp32 masters and their state instead of the parameters', and writes them over
    the parameters at the next step. A group's flat tensors are made anew from its parameters here.
    """
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    adapters = [index for index, group in enumerate(groups) if group["adapter"]]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3: one or more flat tensors per group
        for flat, group in optimizer.sub_group_to_group_id.items():
            if group in adapters:
                master = optimizer.fp32_partitioned_groups_flat[flat]
                master.data.copy_(optimizer.fp16_partitioned_groups_flat[flat].data)
                _reset(optimizer.optimizer.state.get(master, {}))
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2: one flat tensor per group
        for group in adapters:
            master = optimizer.single_partition_of_fp32_groups[group]
            part = torch.distributed.get_rank(optimizer.real_dp_process_group[group])
            master.data.copy_(optimizer.parallel_partitioned_bit16_groups[group][part].data)
            _reset(optimizer.optimizer.state.get(master, {}))
    else:
        for group in adapters:
            for parameter in groups[group]["params"]:
                _reset(optimizer.state.get(parameter, {}))


def _reset(state: dict[str, Any]) -> None:
    """AdamW's two moments and its step count."""
    for value in state.values():
        value.zero_()
