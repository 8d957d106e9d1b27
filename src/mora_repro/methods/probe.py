"""What the linear layers of a decoder layer keep for the backward pass and compute: seen on the meta device.

A layer with any adapter is run forwards and backwards there, without memory or arithmetic, while autograd says what it
keeps and torch's counter what it multiplies. So no method needs a formula of its own.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Linear:
    """A linear layer with its adapter, on `tokens` tokens of a micro-batch.

    Args:
        kept: bytes that autograd keeps between its forward and its backward, beside its input and its parameters.
        keeps_input: whether it keeps its input too.
        extra: bytes that its forward or its backward pass takes for a moment on top of what it keeps.
        forward, backward: FLOPs, two for a multiplication with its addition.
    """

    name: str
    in_features: int
    out_features: int
    kept: int
    keeps_input: bool
    extra: int
    forward: int
    backward: int


class _Held:
    """A tensor that autograd keeps; gone when autograd lets it go."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class _Live(TorchDispatchMode):
    """Follows the bytes of the storages that are made within and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        old = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and (place := _place(leaf)) not in old | self.seen:
                self._follow(leaf, place)
        return made

    def _follow(self, tensor: Tensor, place: int) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)

        def let_go() -> None:
            self.now -= size
            self.seen.discard(place)

        weakref.finalize(storage, let_go)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _DropoutOfCuda(TorchFunctionMode):
    """Dropout keeps a mask of a byte per value, as on a GPU. The meta device has it as a CPU does."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.dropout:
            return torch.native_dropout(args[0], kwargs["p"], kwargs["training"])[0]
        return function(*args, **(kwargs or {}))


def probe(
    layer: nn.Module, name: str, samples: int, length: int, dtype: torch.dtype, cuda: bool = True, hooks: bool = False
) -> Linear:
    """Run a linear layer on the meta device on `samples` x `length` tokens in `dtype`.

    Args:
        cuda: dropout keeps what it does on a GPU that has Triton, else what it does on a CPU.
        hooks: modules have hooks, as under ZeRO 3, which some layers compute otherwise with.
    """
    layer = copy.deepcopy(layer).to(dtype).train()
    if hooks:
        for module in layer.modules():
            module.register_forward_hook(lambda *_: None)
    in_features, out_features = sides(layer)
    x = torch.empty(samples, length, in_features, dtype=dtype, device="meta", requires_grad=True)
    fixed = {_place(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def hold(tensor: Tensor) -> _Held:
        held.add(one := _Held(tensor))
        return one

    dropout = _DropoutOfCuda() if cuda else nullcontext()
    with dropout, _Live() as live, torch.autograd.graph.saved_tensors_hooks(hold, lambda one: one.tensor):
        y = cast(Tensor, layer(x))
    by_place = {_place(one.tensor): one.tensor.untyped_storage().nbytes() for one in held}
    keeps_input = _place(x) in by_place
    kept = sum(size for place, size in by_place.items() if place not in fixed and place != _place(x))
    forward_extra = live.peak - kept
    gradient = torch.empty_like(y)
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    with live:
        before = live.peak = live.now
        torch.autograd.grad(y, wanted, gradient, allow_unused=True)
    # In a run of its own, since the counter holds on to what would be gone.
    with warnings.catch_warnings(action="ignore"), flop_counter() as counter:
        y = layer(x.detach().requires_grad_())
        forward = int(counter.get_total_flops())
        torch.autograd.backward(y, gradient)
    backward = int(counter.get_total_flops()) - forward
    return Linear(
        name, in_features, out_features, kept, keeps_input, max(forward_extra, live.peak - before), forward, backward
    )


def flop_counter() -> FlopCounterMode:
    """torch's, which by itself passes over the products that are added in place."""

    def added(onto: torch.Size, a: torch.Size, b: torch.Size, **_: Any) -> int:
        return 2 * a.numel() * b[-1]

    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={aten.addmm_: added, aten.baddbmm_: added})


def sides(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, adapted or not."""
    base: Any = cast(BaseTunerLayer, layer).get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)


def decoder(model: nn.Module) -> tuple[PreTrainedModel, PreTrainedConfig, nn.ModuleList]:
    """The model of transformers below an adapter, the configuration of its text part, and its decoder layers."""
    whole: Any = model
    base: PreTrainedModel = whole.get_base_model() if hasattr(model, "get_base_model") else whole
    config = base.config.get_text_config()
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    return base, config, next(found for found in lists if len(found) == config.num_hidden_layers)


def linear_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear layers in a decoder layer, with their adapters, by the last part of their name."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, BaseTunerLayer | nn.Linear | Conv1D):
                found[name] = child
            else:
                walk(child)

    walk(layer)
    return found
