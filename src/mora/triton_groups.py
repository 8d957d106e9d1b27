"""Sums over groups of values, and their transpose, on a GPU: one pass over the tokens each, with dropout in it.

What sharing does beside its product with M. PyTorch's own operations take a pass for each group, or one that reads
value by value, and keep a mask for dropout's backward pass. Imported where it is first needed, since Triton may be
absent: `kernels.py`.

Tokens are T x F in row-major order. With a size R, the groups are those of operators.py (`sharing_compress`): strided,
value f belongs to group f mod R, and where it wraps, value f also to group f + F mod R, for f < R - F mod R; blocked,
contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import FACTOR, LEVELS, STEP, VALUES, Mask
from .operators import Grouping

_TILE = 2048  # values of a tile: tokens times groups
_GROUPS = 256  # of a tile at most

# As Triton reads a global: constants, of 64 bits without a sign.
_FACTOR, _STEP = tl.constexpr(FACTOR), tl.constexpr(STEP)
_VALUES, _BITS = tl.constexpr(VALUES), tl.constexpr(64 // VALUES)
_ALL, _SIGN = tl.constexpr(LEVELS - 1), tl.constexpr(LEVELS // 2)


def sum_groups(x_TF: Tensor, size: int, grouping: Grouping, wrap: bool, mask: Mask | None = None) -> Tensor:
    """The sum over each group of values, T x R in x's dtype, summed up in fp32.

    Args:
        size: R.
        wrap: strided groups are those of x padded with its own first values.
        mask: of a dropout of x, without its scale; default: none.
    """
    x_TF = x_TF.contiguous()
    tokens, features = x_TF.shape
    total_TR = x_TF.new_empty(tokens, size)
    _launch(_sum_groups, x_TF, total_TR, tokens, features, size, grouping, wrap, mask)
    return total_TR


def add_to_groups(
    y_TF: Tensor, values_TR: Tensor, grouping: Grouping, wrap: bool, fresh: bool, mask: Mask | None = None
) -> None:
    """y += the value of each one's group, times the mask; in place, and y contiguous.

    Args:
        wrap: the transpose of [`sum_groups`] with `wrap`: values of two groups get both.
        fresh: y is written, and what it held before is not read.
        mask: of a dropout, without its scale; default: none.
    """
    tokens, features = y_TF.shape
    values_TR = values_TR.contiguous()
    _launch(_add_to_groups, y_TF, values_TR, tokens, features, values_TR.shape[1], grouping, wrap, mask, FRESH=fresh)


def _launch(
    kernel: triton.JITFunction,
    x_TF: Tensor,
    groups_TR: Tensor,
    tokens: int,
    features: int,
    size: int,
    grouping: Grouping,
    wrap: bool,
    mask: Mask | None,
    **constants: bool,
) -> None:
    if tokens == 0:
        return
    per_tile = min(_GROUPS, triton.next_power_of_2(size))
    rows = _TILE // per_tile
    with torch.cuda.device_of(x_TF):
        kernel[(triton.cdiv(tokens, rows), triton.cdiv(size, per_tile))](
            x_TF,
            groups_TR,
            tokens,
            mask.seed if mask else 0,
            mask.dropped if mask else 0,
            FEATURES=features,
            SIZE=size,
            BLOCKED=grouping == "blocked",
            WRAPPED=wrap and grouping == "strided",
            MASKED=mask is not None,
            ROWS=rows,
            GROUPS=per_tile,
            **constants,
        )


@triton.jit
def _kept(position, seed, dropped):
    """Whether dropout keeps the values at these positions of x: `Mask.of`, value by value."""
    bits = (position // _VALUES).to(tl.uint64) * _STEP + seed.to(tl.uint64)
    for _ in tl.static_range(2):
        bits = (bits ^ (bits >> 32)) * _FACTOR
    bits ^= bits >> 32
    own = (bits >> ((position % _VALUES) * _BITS).to(tl.uint64)).to(tl.int32) & _ALL
    return (own ^ _SIGN) >= dropped


@triton.jit
def _first_of_group(group, FEATURES: tl.constexpr, SIZE: tl.constexpr, BLOCKED: tl.constexpr):
    """(index of a group's first value, from one of its values to the next)."""
    if BLOCKED:
        first = group * (FEATURES // SIZE) + tl.minimum(group, FEATURES % SIZE)
        step: tl.constexpr = 1
    else:
        first = group
        step: tl.constexpr = SIZE
    return first, step


@triton.jit
def _read(x, index, inside, seed, dropped, MASKED: tl.constexpr):
    """Values at the index, in fp32; 0 where it is not inside, or dropped."""
    value = tl.load(x + index, mask=inside, other=0).to(tl.float32)
    if MASKED:
        value = tl.where(_kept(index, seed, dropped), value, 0.0)
    return value


@triton.jit(do_not_specialize=["tokens", "seed", "dropped"])
def _sum_groups(
    x,
    total,
    tokens,
    seed,
    dropped,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCKED: tl.constexpr,
    WRAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :]
    inside = (token < tokens) & (group < SIZE)
    first, step = _first_of_group(group, FEATURES, SIZE, BLOCKED)
    index = token * FEATURES + first
    sums = tl.zeros((ROWS, GROUPS), tl.float32)
    for member in tl.range(0, FEATURES // SIZE, loop_unroll_factor=4):
        sums += _read(x, index + member * step, inside, seed, dropped, MASKED)
    past: tl.constexpr = FEATURES % SIZE
    if past > 0:
        whole: tl.constexpr = FEATURES // SIZE
        sums += _read(x, index + whole * step, inside & (group < past), seed, dropped, MASKED)
        if WRAPPED:
            sums += _read(x, index - past, inside & (group >= past), seed, dropped, MASKED)
    tl.store(total + token * SIZE + group, sums.to(total.dtype.element_ty), mask=inside)


@triton.jit
def _add(y, index, value, inside, seed, dropped, MASKED: tl.constexpr, FRESH: tl.constexpr):
    if MASKED:
        value = tl.where(_kept(index, seed, dropped), value, 0.0)
    if not FRESH:
        value += tl.load(y + index, mask=inside, other=0).to(tl.float32)
    tl.store(y + index, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "seed", "dropped"])
def _add_to_groups(
    y,
    values,
    tokens,
    seed,
    dropped,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCKED: tl.constexpr,
    WRAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    FRESH: tl.constexpr,
):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :]
    inside = (token < tokens) & (group < SIZE)
    first, step = _first_of_group(group, FEATURES, SIZE, BLOCKED)
    index = token * FEATURES + first
    source = values + token * SIZE + group
    value = tl.load(source, mask=inside, other=0).to(tl.float32)
    past: tl.constexpr = FEATURES % SIZE
    twice = value
    if WRAPPED and past > 0:
        twice += tl.load(source + past, mask=inside & (group < SIZE - past), other=0).to(tl.float32)
    _add(y, index, twice, inside, seed, dropped, MASKED, FRESH)
    for member in tl.range(1, FEATURES // SIZE, loop_unroll_factor=4):
        _add(y, index + member * step, value, inside, seed, dropped, MASKED, FRESH)
    if past > 0:
        whole: tl.constexpr = FEATURES // SIZE
        _add(y, index + whole * step, value, inside & (group < past), seed, dropped, MASKED, FRESH)


def works(device: torch.device) -> None:
    """Raises what Triton raises on a device that it has no code for, or a machine without a C compiler."""
    x = torch.ones(1, 2, device=device)
    if sum_groups(x, 1, "strided", False).item() != 2:
        raise RuntimeError("a sum of Triton's came out wrong")
