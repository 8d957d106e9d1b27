"""The built-in operators' training step, written out: less memory, fewer passes, the same numbers.

The pure pairs of operators.py say what an operator computes, and autograd can differentiate them. That makes copies
that need not be: x padded and turned, the output repeated and then added, and the same again on the way back. Here
the update is added into the base's output, and the backward pass is written by hand. What it keeps of x is its
compressed form (sharing), or x itself, which layers of the same input share (the block operators). Three ways:

    add_update   base's output += update. For any base layer and dtype, and with dropout.
    with_base    base and update in one function, so that x's gradient is added into the base's too.
    folded       x (W + delta)^T in one product: the adapter's products of the forward pass and for the gradient of x
                 cost nothing, the sum costs two passes over the weight. Only where W + delta loses no digits.

The first two take dropout in: its mask is computed anew where it is needed. Which way is taken, [`mora.layer.Linear`]
decides. On a GPU, triton_kernels.py computes what surrounds the products in each of them.

None can be differentiated twice, forwards (`forward_ad`) or for many gradients at once (`is_grads_batched`); PyTorch
says so in an error. Inputs are cast before, so that autocast is off within: it would give a sum in fp32, and a gradient
another dtype than the tensors that it is added to.

Shape suffixes as in operators.py, and
    T   tokens: all batch dimensions in one
    P   N R, the length of all blocks
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .dropout import Mask
from .operators import (
    HALF,
    Layout,
    Operator,
    add_repeated,
    decoupling_matrices,
    decoupling_matrices_adjoint,
    get_operator,
    rotation_matrices,
    rotation_matrices_adjoint,
    sharing_compress,
    sharing_compress_adjoint,
    sharing_decompress,
    sharing_decompress_adjoint,
    sum_repeated,
)

_NOTHING = nullcontext()


class Kernel(Protocol):
    """An operator's step on tokens in one dimension. A mask is of dropout of x."""

    scales: bool  # whether it takes the mask's scale into account; else M has it, and its gradient gets it

    def products(self, layout: Layout) -> int:
        """Multiplications by M's entries for each token."""

    def pays(self, tokens: int, layout: Layout, dtype: torch.dtype) -> bool:
        """Whether it is faster than autograd on the operator's functions, as measured (docs/performance.md)."""

    def drops(self, device: torch.device) -> bool:
        """Whether it is also faster with a mask than PyTorch's dropout on that device."""

    def keep(self, x_TK: Tensor, layout: Layout) -> Tensor:
        """What the gradient of M needs of x, where `add_` is not called; without dropout."""

    def add_(self, y_TD: Tensor, x_TK: Tensor, m_RR: Tensor, layout: Layout, mask: Mask | None) -> Tensor:
        """y += decompress(M compress(dropped x)), in place; returns what the gradient of M needs of x."""

    def gradients(
        self,
        g_TD: Tensor,
        kept: Tensor | None,
        m_RR: Tensor | None,
        layout: Layout,
        onto_TK: Tensor | None,
        mask: Mask | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of x, T x K, and of M, R x R, from that of the output; x's without W's part.

        Args:
            kept: by the forward pass; None where the gradient of M is not asked for.
            m_RR: None where the gradient of x is not asked for.
            onto_TK: the gradient of x is added to it in place; default: to nothing.
        """


class SharingKernel:
    """y += decompress(M c) for c = compress(x); the gradient of M is (decompress^T g)^T c."""

    scales = False

    def products(self, layout: Layout) -> int:
        return layout.size**2

    def pays(self, tokens: int, layout: Layout, dtype: torch.dtype) -> bool:
        return 4 * tokens >= layout.size

    def drops(self, device: torch.device) -> bool:
        return _on_cpu(device)

    def keep(self, x_TK: Tensor, layout: Layout) -> Tensor:
        return self._compressed(x_TK, layout, None)

    def add_(self, y_TD: Tensor, x_TK: Tensor, m_RR: Tensor, layout: Layout, mask: Mask | None) -> Tensor:
        c_TR = self._compressed(x_TK, layout, mask)
        self._add_decompressed(y_TD, linear(c_TR, self._matrix(m_RR)), layout)
        return c_TR

    def gradients(
        self,
        g_TD: Tensor,
        kept: Tensor | None,
        m_RR: Tensor | None,
        layout: Layout,
        onto_TK: Tensor | None,
        mask: Mask | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        g_TR = self._decompressed_adjoint(g_TD, layout)
        x_grad = m_grad = None
        if m_RR is not None:
            x_grad = self._compressed_adjoint(g_TR @ self._matrix(m_RR), layout, onto_TK, mask)
        if kept is not None:
            m_grad = (g_TR.T @ kept)[: layout.size, : layout.size]
        return x_grad, m_grad

    # What a GPU has kernels of its own for. There, R may be a width that is larger, with zeros behind R.

    def _matrix(self, m_RR: Tensor) -> Tensor:
        return m_RR

    def _compressed(self, x_TK: Tensor, layout: Layout, mask: Mask | None) -> Tensor:
        return sharing_compress(_dropped(x_TK, mask), layout)

    def _add_decompressed(self, y_TD: Tensor, u_TR: Tensor, layout: Layout) -> None:
        if layout.out_grouping == "strided":
            add_repeated(y_TD, u_TR)
        else:
            y_TD += sharing_decompress(u_TR, layout)

    def _decompressed_adjoint(self, g_TD: Tensor, layout: Layout) -> Tensor:
        return sharing_decompress_adjoint(g_TD, layout)

    def _compressed_adjoint(self, c_TR: Tensor, layout: Layout, onto_TK: Tensor | None, mask: Mask | None) -> Tensor:
        mask_TK = None if mask is None else mask.of((len(c_TR), layout.in_features), c_TR)
        if onto_TK is None or layout.in_grouping == "blocked":
            return _joined(sharing_compress_adjoint(c_TR, layout), onto_TK, mask_TK)
        add_repeated(onto_TK, c_TR, factor=mask_TK)
        if past := layout.in_features % layout.size:  # these values of x are in two groups
            twice = slice(0, layout.size - past)
            _joined(c_TR[:, past:], onto_TK[:, twice], None if mask_TK is None else mask_TK[:, twice])
        return onto_TK


class BlockKernel:
    """Decoupling and rotation: y_n += M_n x_n for each block n, M_n = M R_n.

    M is turned, once for each block, and the tokens are not. The gradient of M is the sum of those of the M_n, each
    turned back.
    """

    scales = False

    def __init__(
        self, matrices: Callable[[Tensor, Layout], Tensor], matrices_adjoint: Callable[[Tensor, Layout], Tensor]
    ) -> None:
        self.matrices, self.matrices_adjoint = matrices, matrices_adjoint

    def products(self, layout: Layout) -> int:
        return layout.blocks * layout.size**2

    def pays(self, tokens: int, layout: Layout, dtype: torch.dtype) -> bool:
        return tokens >= layout.size * (1.5 if dtype in HALF else 1)  # fewer are turned sooner than M

    def drops(self, device: torch.device) -> bool:
        return _on_cpu(device)

    def keep(self, x_TK: Tensor, layout: Layout) -> Tensor:
        return x_TK

    def add_(self, y_TD: Tensor, x_TK: Tensor, m_RR: Tensor, layout: Layout, mask: Mask | None) -> Tensor:
        whole_TK, x_TK = x_TK, _dropped(x_TK, mask)
        m_NRR = self.matrices(m_RR, layout)
        repeated = _repeats(layout)
        u_TP = y_TD.new_empty(len(y_TD), layout.blocks * layout.size) if repeated else y_TD
        beta = 0 if repeated else 1
        full, last, rows, inside, wrapped = _cut(layout)
        _blocks(u_TP, full, layout).baddbmm_(_blocks(x_TK, full, layout), m_NRR[:full].mT, beta=beta)
        if rows:
            m_RR = m_NRR[-1, :rows]
            u_TR = u_TP[:, last : last + rows]
            u_TR.addmm_(x_TK[:, last : last + inside], m_RR[:, :inside].T, beta=beta)
            if wrapped:
                u_TR.addmm_(x_TK[:, :wrapped], m_RR[:, inside:].T)
        if repeated:
            add_repeated(y_TD, u_TP)
        return whole_TK  # which other layers share, and not the dropped copy

    def gradients(
        self,
        g_TD: Tensor,
        kept: Tensor | None,
        m_RR: Tensor | None,
        layout: Layout,
        onto_TK: Tensor | None,
        mask: Mask | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        g_TP = sum_repeated(g_TD, layout.blocks * layout.size) if _repeats(layout) else g_TD
        mask_TK = None if mask is None else mask.of((len(g_TD), layout.in_features), g_TD)
        x_grad = m_grad = None
        if m_RR is not None and mask_TK is None:
            x_grad = self._gradient_of_x(g_TP, m_RR, layout, onto_TK)
        elif m_RR is not None:
            x_grad = _joined(self._gradient_of_x(g_TP, m_RR, layout, None), onto_TK, mask_TK)
        if kept is not None:
            m_grad = self._gradient_of_m(g_TP, kept if mask_TK is None else mask_TK.mul_(kept), layout)
        return x_grad, m_grad

    def _gradient_of_m(self, g_TP: Tensor, x_TK: Tensor, layout: Layout) -> Tensor:
        full, last, rows, inside, wrapped = _cut(layout)
        m_NRR = _sum_of_products(_blocks(g_TP, full, layout), _blocks(x_TK, full, layout))
        if rows:
            g_RT, m_1RR = g_TP[:, last : last + rows].T, m_NRR.new_zeros(1, layout.size, layout.size)
            m_1RR[0, :rows, :inside] = g_RT @ x_TK[:, last : last + inside]
            m_1RR[0, :rows, inside:] = g_RT @ x_TK[:, :wrapped]
            m_NRR = torch.cat((m_NRR, m_1RR))
        return self.matrices_adjoint(m_NRR, layout).to(x_TK.dtype)

    def _gradient_of_x(self, g_TP: Tensor, m_RR: Tensor, layout: Layout, onto_TK: Tensor | None) -> Tensor:
        m_NRR = self.matrices(m_RR, layout)
        full, last, rows, inside, wrapped = _cut(layout)
        x_TK, beta = onto_TK, 1
        if x_TK is None:
            x_TK, beta = g_TP.new_empty(len(g_TP), layout.in_features), 0
            x_TK[:, layout.blocks * layout.size :] = 0  # not read
        _blocks(x_TK, full, layout).baddbmm_(_blocks(g_TP, full, layout), m_NRR[:full], beta=beta)
        if rows:
            g_TR, m_RR = g_TP[:, last : last + rows], m_NRR[-1, :rows]
            x_TK[:, last : last + inside].addmm_(g_TR, m_RR[:, :inside], beta=beta)
            if wrapped:
                x_TK[:, :wrapped].addmm_(g_TR, m_RR[:, inside:])
        return x_TK


def _on_cpu(device: torch.device) -> bool:
    """The meta device, where memory is planned, is a CPU here."""
    return device.type in ("cpu", "meta")


def _dropped(x: Tensor, mask: Mask | None) -> Tensor:
    return x if mask is None else mask.of(x.shape, x).mul_(x)


def _joined(t: Tensor, onto: Tensor | None, mask: Tensor | None) -> Tensor:
    """onto + mask t, changing `onto`, or t where that is not given."""
    if onto is None:
        return t if mask is None else t.mul_(mask)
    return onto.add_(t) if mask is None else onto.addcmul_(t, mask)


def _repeats(layout: Layout) -> bool:
    """The blocks' outputs are shorter than the output, and so repeated."""
    return layout.out_features > layout.blocks * layout.size


def _cut(layout: Layout) -> tuple[int, int, int, int, int]:
    """How the blocks lie: those that are whole, and the last where it is not among them.

    (blocks that are whole in x and in the output, one at least; where the last one starts, its rows that are not cut,
    how many of its columns lie before the end of x, how many wrap around to x's beginning); the last three are 0
    without such one.
    """
    size = layout.size
    full = min(layout.in_features, layout.out_features) // size
    last = full * size
    if full == layout.blocks:
        return full, last, 0, 0, 0
    inside = min(size, layout.in_features - last)
    return full, last, min(size, layout.out_features - last), inside, size - inside


def _sum_of_products(g_NTR: Tensor, x_NTR: Tensor) -> Tensor:
    """The sums over the tokens of g x^T, N x R x R.

    Rows of a block lie far apart in memory. A CPU takes up to four times as long for that in one batched product as
    it does block by block in half precision, and with few tokens at a time in single precision.
    """
    if x_NTR.device.type != "cpu":
        return torch.bmm(g_NTR.mT, x_NTR)
    if x_NTR.dtype in HALF:
        return torch.stack([g.T @ x for g, x in zip(g_NTR, x_NTR, strict=True)])
    total_NRR = x_NTR.new_zeros(len(x_NTR), x_NTR.shape[2], x_NTR.shape[2])
    for g, x in zip(g_NTR.split(128, dim=1), x_NTR.split(128, dim=1), strict=True):
        total_NRR.baddbmm_(g.mT, x)
    return total_NRR


def _blocks(t_TF: Tensor, full: int, layout: Layout) -> Tensor:
    """A view of the first blocks: full x T x R."""
    return t_TF[:, : full * layout.size].unflatten(1, (full, layout.size)).transpose(0, 1)


# ---------------------------------------------------------------------------------------------------
# Which kernel computes an operator

_KERNELS: dict[str, tuple[Operator, Kernel]] = {
    "sharing": (get_operator("sharing"), SharingKernel()),
    "decoupling": (get_operator("decoupling"), BlockKernel(decoupling_matrices, decoupling_matrices_adjoint)),
    "rotation": (get_operator("rotation"), BlockKernel(rotation_matrices, rotation_matrices_adjoint)),
}


def kernel_of(operator: Operator, x: Tensor) -> Kernel | None:
    """Of a built-in operator, for tensors of x's device and dtype.

    One that a user registers under the same name is computed by its own functions.
    """
    known, kernel = _KERNELS.get(operator.name, (None, None))
    if known is not operator:
        return None
    if x.device.type == "cuda" and x.dtype != torch.float64:  # Triton's sum up in single precision
        return _triton_kernels(x.device).get(operator.name, kernel)
    return kernel


@cache
def _triton_kernels(device: torch.device) -> dict[str, Kernel]:
    """Those of a GPU, by the operator's name; none, and a warning, where Triton doesn't work."""
    try:
        from . import triton_kernels as triton

        triton.works(device)
    except Exception as error:  # Triton has many
        text = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"MoRA's training step takes longer on {device}, since Triton fails there: {text}", stacklevel=2)
        return {}
    return {
        "sharing": triton.TritonSharing(),
        "decoupling": triton.TritonBlocks(decoupling_matrices, decoupling_matrices_adjoint),
        "rotation": triton.TritonBlocks(triton.rotation_matrices, triton.rotation_matrices_adjoint),
    }


# ---------------------------------------------------------------------------------------------------
# As functions that autograd knows


@dataclass(frozen=True)
class _Update:
    """decompress(M compress(dropout(x))) of one call, on tokens in one dimension."""

    operator: Operator
    kernel: Kernel  # of the operator
    layout: Layout
    mask: Mask | None

    @staticmethod
    def of(operator: Operator, layout: Layout, mask: Mask | None, x: Tensor) -> _Update:
        kernel = kernel_of(operator, x)
        assert kernel is not None
        return _Update(operator, kernel, layout, mask)

    def folded(self, weight_DK: Tensor, m_RR: Tensor) -> Tensor:
        """W + delta(M), without dropout."""
        total_DK = torch.empty_like(weight_DK)
        self.operator.add_to(weight_DK, m_RR, self.layout, 1, total_DK)
        return total_DK

    def add_(self, y_TD: Tensor, x_TK: Tensor, m_RR: Tensor) -> Tensor:
        """y += the update, in place; returns what `gradients` needs of x."""
        return self.kernel.add_(y_TD, x_TK, self._scaled(m_RR), self.layout, self.mask)

    def gradients(
        self, g_TD: Tensor, kept: Tensor | None, m_RR: Tensor | None, onto_TK: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of x and of M, from that of the output; arguments as of [`Kernel.gradients`]."""
        m_RR = None if m_RR is None else self._scaled(m_RR)
        x_grad, m_grad = self.kernel.gradients(g_TD, kept, m_RR, self.layout, onto_TK, self.mask)
        return x_grad, None if m_grad is None else self._scaled(m_grad)

    def _scaled(self, m_RR: Tensor) -> Tensor:
        return m_RR if self.mask is None or self.kernel.scales else m_RR * self.mask.scale


def add_update(
    base_BD: Tensor,
    x_BK: Tensor,
    m_RR: Tensor,
    operator: Operator,
    layout: Layout,
    in_place: bool,
    mask: Mask | None = None,
) -> Tensor:
    """base + decompress(M compress(dropout(x))), all three of one dtype.

    Args:
        operator: one with a kernel.
        in_place: the base's output is changed and returned. Only for an output that nobody else reads.
        mask: of the dropout; default: none.
    """
    return _AddUpdate.apply(base_BD, x_BK, m_RR, _Update.of(operator, layout, mask, x_BK), in_place)


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base_BD: Tensor, x_BK: Tensor, m_RR: Tensor, update: _Update, in_place: bool) -> Tensor:
        ctx.update, ctx.shape = update, x_BK.shape
        if in_place:
            ctx.mark_dirty(base_BD)
        y_BD = base_BD if in_place else base_BD.clone(memory_format=torch.contiguous_format)
        with _as_it_is(x_BK):
            kept = update.add_(y_BD.view(-1, update.layout.out_features), _in_one(x_BK), m_RR)
        ctx.save_for_backward(kept if ctx.needs_input_grad[2] else None, m_RR if ctx.needs_input_grad[1] else None)
        return y_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BD: Tensor) -> tuple[Tensor | None, ...]:
        kept, m_RR = ctx.saved_tensors
        with _as_it_is(g_BD):
            x_grad, m_grad = ctx.update.gradients(_in_one(g_BD), kept, m_RR, None)
        return g_BD, None if x_grad is None else x_grad.view(ctx.shape), m_grad, None, None


def with_base(
    x_BK: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    m_RR: Tensor,
    operator: Operator,
    layout: Layout,
    fold: bool,
    mask: Mask | None = None,
) -> Tensor:
    """W x + b + decompress(M compress(dropout(x))), for a frozen W and b; all of one dtype.

    Args:
        operator: one with a kernel.
        fold: x (W + delta(M))^T + b in one product. The sum is built for the forward pass and again for the backward
            pass, and not kept between them. Not with dropout, which the base's input does not have.
        mask: of the dropout; default: none.
    """
    assert not (fold and mask), "with dropout, base and update have different inputs"
    return _WithBase.apply(x_BK, weight_DK, bias_D, m_RR, _Update.of(operator, layout, mask, x_BK), fold)


class _WithBase(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BK: Tensor,
        weight_DK: Tensor,
        bias_D: Tensor | None,
        m_RR: Tensor,
        update: _Update,
        fold: bool,
    ) -> Tensor:
        ctx.update, ctx.fold, x_TK = update, fold, _in_one(x_BK)
        with _as_it_is(x_BK):
            if fold:
                kept = update.kernel.keep(x_TK, update.layout) if ctx.needs_input_grad[3] else None
                y_BD = linear(x_BK, update.folded(weight_DK, m_RR), bias_D)
            else:
                y_BD = linear(x_BK, weight_DK, bias_D)
                kept = update.add_(y_BD.view(-1, update.layout.out_features), x_TK, m_RR)
        ctx.save_for_backward(
            kept if ctx.needs_input_grad[3] else None, weight_DK, m_RR if ctx.needs_input_grad[0] else None
        )
        return y_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BD: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight_DK, m_RR = ctx.saved_tensors
        x_grad = m_grad = None
        with _as_it_is(g_BD):
            if not ctx.fold:
                x_grad = g_BD @ weight_DK if ctx.needs_input_grad[0] else None
                onto_TK = None if x_grad is None else x_grad.view(-1, ctx.update.layout.in_features)
                _, m_grad = ctx.update.gradients(_in_one(g_BD), kept, m_RR, onto_TK)
            else:
                if ctx.needs_input_grad[0]:
                    x_grad = g_BD @ ctx.update.folded(weight_DK, m_RR)
                if kept is not None:
                    _, m_grad = ctx.update.gradients(_in_one(g_BD), kept, None, None)
        return x_grad, None, None, m_grad, None, None


def _in_one(x_BF: Tensor) -> Tensor:
    """All batch dimensions in one: x_TF."""
    return x_BF.reshape(-1, x_BF.shape[-1])


def _as_it_is(tensor: Tensor) -> AbstractContextManager[Any]:
    """Without autocast."""
    return torch.autocast(tensor.device.type, enabled=False) if under_autocast(tensor) else _NOTHING


def under_autocast(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
