"""Weights that ZeRO 3 may have sharded: reading, writing and saving them as if they were whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from .. import distributed


@contextmanager
def _gathered(parameters: Sequence[Tensor], writer: int | None) -> Iterator[None]:
    """Within: shards are put together; afterwards they are as rank `writer` left them."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=writer):
        yield
    # Small parameters are kept whole between steps. Found in shards, they would be fetched out of turn, and DeepSpeed
    # takes that for a model that has changed.
    if kept := [parameter for parameter in parameters if parameter.ds_persist]:  # type: ignore[attr-defined]
        kept[0].all_gather(kept)  # type: ignore[attr-defined]


def _is_sharded(parameters: Sequence[Tensor]) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


@contextmanager
def whole(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within: the parameters are whole on every rank, for reading."""
    with _gathered(parameters, None) if _is_sharded(parameters) else nullcontext():
        yield


@contextmanager
def written_by_main(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within: the parameters are whole; afterwards every rank has what rank 0 wrote into them."""
    if _is_sharded(parameters):
        with _gathered(parameters, 0):
            yield
        return
    yield
    if distributed.size() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)


def state_of_main(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all parameters in the CPU's memory on rank 0, gathered one at a time; empty on the others."""
    state = {}
    for name, parameter in parameters.items():
        with whole([parameter]):
            if distributed.is_main():
                state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return state


def load_into(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Write `state`, which rank 0 has, into the parameters of those names.

    Raises KeyError on rank 0 where a parameter has no value.
    """
    for name, parameter in parameters.items():
        with written_by_main([parameter]), torch.no_grad():
            if distributed.is_main():
                parameter.data.copy_(state[name])
