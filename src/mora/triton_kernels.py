"""The operators' training step on a GPU: what surrounds the products with M, in one pass each.

PyTorch's own operations take several passes for it, or one that reads value by value, and keep a mask for dropout's
backward pass. Imported where it is first needed, since Triton may be absent: `kernel_of` in kernels.py.

Shape suffixes as in kernels.py, and
    F   features: K or D
    W   width: R, rounded up to what a GPU's matrix units read at once (16 bytes); the values behind R are zeros
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton.runtime.interpreter import InterpretedFunction

from .dropout import FACTOR, LEVELS, STEP, VALUES, Mask
from .kernels import SharingKernel
from .operators import Layout, rotation_angles

_TILE = 2048  # values of a tile
_COLUMNS = 256  # of a tile at most

# As Triton reads a global.
_FACTOR, _STEP = tl.constexpr(FACTOR), tl.constexpr(STEP)
_VALUES, _BITS = tl.constexpr(VALUES), tl.constexpr(64 // VALUES)
_ALL, _SIGN = tl.constexpr(LEVELS - 1), tl.constexpr(LEVELS // 2)


# ---------------------------------------------------------------------------------------------------
# Sharing


class TritonSharing(SharingKernel):
    """Sums over groups and their transpose in one pass over the tokens, with dropout in it; products of width W."""

    def drops(self, device: torch.device) -> bool:
        return True

    def _matrix(self, m_RR: Tensor) -> Tensor:
        missing = _width(len(m_RR), m_RR) - len(m_RR)
        return pad(m_RR, (0, missing, 0, missing)) if missing else m_RR

    def _compressed(self, x_TK: Tensor, layout: Layout, mask: Mask | None) -> Tensor:
        return sum_groups(x_TK, layout.size, layout.in_grouping == "blocked", True, mask)

    def _add_decompressed(self, y_TD: Tensor, u_TW: Tensor, layout: Layout) -> None:
        add_to_groups(y_TD, u_TW, layout.size, layout.out_grouping == "blocked", False)

    def _decompressed_adjoint(self, g_TD: Tensor, layout: Layout) -> Tensor:
        return sum_groups(g_TD, layout.size, layout.out_grouping == "blocked", False)

    def _compressed_adjoint(self, c_TW: Tensor, layout: Layout, onto_TK: Tensor | None, mask: Mask | None) -> Tensor:
        x_TK = c_TW.new_empty(len(c_TW), layout.in_features) if onto_TK is None else onto_TK
        add_to_groups(x_TK, c_TW, layout.size, layout.in_grouping == "blocked", True, mask, fresh=onto_TK is None)
        return x_TK


def _width(size: int, like: Tensor) -> int:
    """W for tensors of that dtype."""
    unit = 16 // like.element_size()
    return _ceil(size, unit) * unit


def sum_groups(x_TF: Tensor, size: int, blocked: bool, wrap: bool, mask: Mask | None = None) -> Tensor:
    """The sum over each group of values, T x W in x's dtype, summed up in fp32.

    Strided: value f belongs to group f mod R. Blocked: contiguous groups, the first F mod R of one member more.

    Args:
        size: R.
        wrap: strided groups are those of x padded with its own first values to a multiple of R.
        mask: of a dropout of x, without its scale; default: none.
    """
    x_TF = x_TF.contiguous()
    sums_TW = x_TF.new_empty(len(x_TF), _width(size, x_TF))
    _over_groups(_sum_groups, x_TF, sums_TW, size, blocked, wrap, mask)
    return sums_TW


def add_to_groups(
    y_TF: Tensor,
    values_TW: Tensor,
    size: int,
    blocked: bool,
    wrap: bool,
    mask: Mask | None = None,
    fresh: bool = False,
) -> None:
    """y += the value of each one's group, times the mask; in place. Groups as in [`sum_groups`].

    Args:
        y_TF: contiguous.
        wrap: the transpose of `sum_groups` with `wrap`: values of two groups get both.
        mask: of a dropout, without its scale; default: none.
        fresh: y is written, and what it held before is not read.
    """
    _over_groups(_add_to_groups, y_TF, values_TW.contiguous(), size, blocked, wrap, mask, fresh)


def _over_groups(
    kernel: Any,
    x_TF: Tensor,
    groups_TW: Tensor,
    size: int,
    blocked: bool,
    wrap: bool,
    mask: Mask | None,
    *fresh: bool,
) -> None:
    (tokens, features), width = x_TF.shape, groups_TW.shape[1]
    columns = min(_COLUMNS, _power_of_2(width))
    rows = _TILE // columns
    seed, dropped = (mask.seed, mask.dropped) if mask else (0, 0)
    constants = (features, size, width, blocked, wrap and not blocked, mask is not None, rows, columns, *fresh)
    grid = (_ceil(tokens, rows), _ceil(width, columns), 1)
    _launch(kernel, grid, (x_TF, groups_TW), (tokens, dropped, seed), constants)


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


@triton.jit(do_not_specialize=["tokens", "dropped", "seed"])
def _sum_groups(
    x,
    sums,
    tokens,
    dropped,
    seed,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKED: tl.constexpr,
    WRAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    group = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (token < tokens) & (group < SIZE)
    first, step = _first_of_group(group, FEATURES, SIZE, BLOCKED)
    index = token * FEATURES + first
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for member in tl.range(0, FEATURES // SIZE, loop_unroll_factor=4):
        total += _read(x, index + member * step, inside, seed, dropped, MASKED)
    past: tl.constexpr = FEATURES % SIZE
    if past > 0:
        whole: tl.constexpr = FEATURES // SIZE
        total += _read(x, index + whole * step, inside & (group < past), seed, dropped, MASKED)
        if WRAPPED:
            total += _read(x, index - past, inside & (group >= past), seed, dropped, MASKED)
    tl.store(sums + token * WIDTH + group, total.to(sums.dtype.element_ty), mask=(token < tokens) & (group < WIDTH))


@triton.jit
def _add(y, index, value, inside, seed, dropped, MASKED: tl.constexpr, FRESH: tl.constexpr):
    if MASKED:
        value = tl.where(_kept(index, seed, dropped), value, 0.0)
    if not FRESH:
        value += tl.load(y + index, mask=inside, other=0).to(tl.float32)
    tl.store(y + index, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "dropped", "seed"])
def _add_to_groups(
    y,
    values,
    tokens,
    dropped,
    seed,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKED: tl.constexpr,
    WRAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FRESH: tl.constexpr,
):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    group = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (token < tokens) & (group < SIZE)
    first, step = _first_of_group(group, FEATURES, SIZE, BLOCKED)
    index = token * FEATURES + first
    source = values + token * WIDTH + group
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


# ---------------------------------------------------------------------------------------------------
# Rotation


def rotation_matrices(m_RR: Tensor, layout: Layout) -> Tensor:
    """`operators.rotation_matrices`, N x R x R, in one pass."""
    m_RR = m_RR.contiguous()
    turned_NRR = m_RR.new_empty(layout.blocks, layout.size, layout.size)
    _over_matrix(_turn, m_RR, turned_NRR, layout)
    return turned_NRR


def rotation_matrices_adjoint(m_NRR: Tensor, layout: Layout) -> Tensor:
    """`operators.rotation_matrices_adjoint`, R x R, summed up in fp32."""
    m_NRR = m_NRR.contiguous()
    total_RR = m_NRR.new_empty(layout.size, layout.size)
    _over_matrix(_turn_back, total_RR, m_NRR, layout)
    return total_RR


def _over_matrix(kernel: Any, m_RR: Tensor, m_NRR: Tensor, layout: Layout) -> None:
    half = layout.size // 2
    columns = min(_COLUMNS // 2, _power_of_2(half))
    rows = _TILE // 4 // columns
    grid = (_ceil(layout.size, rows), _ceil(half, columns), 1)
    cos, sin = rotation_angles(layout, m_RR.device)
    _launch(kernel, grid, (m_RR, m_NRR, cos, sin), (), (layout.blocks, layout.size, rows, columns))


@triton.jit
def _pairs(SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the tile's pairs (j, j + R / 2) lie: index of the first, the columns j, which are inside."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row * SIZE + column, column, (row < SIZE) & (column < SIZE // 2)


@triton.jit
def _turn(m, turned, cos, sin, BLOCKS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    index, column, inside = _pairs(SIZE, ROWS, COLUMNS)
    half: tl.constexpr = SIZE // 2
    first = tl.load(m + index, mask=inside, other=0).to(tl.float32)
    second = tl.load(m + index + half, mask=inside, other=0).to(tl.float32)
    for block in range(BLOCKS):
        c = tl.load(cos + block * half + column, mask=column < half, other=0)
        s = tl.load(sin + block * half + column, mask=column < half, other=0)
        out = turned + block * SIZE * SIZE + index
        tl.store(out, (first * c + second * s).to(turned.dtype.element_ty), mask=inside)
        tl.store(out + half, (second * c - first * s).to(turned.dtype.element_ty), mask=inside)


@triton.jit
def _turn_back(total, m, cos, sin, BLOCKS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    index, column, inside = _pairs(SIZE, ROWS, COLUMNS)
    half: tl.constexpr = SIZE // 2
    sum_first = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(BLOCKS):
        c = tl.load(cos + block * half + column, mask=column < half, other=0)
        s = tl.load(sin + block * half + column, mask=column < half, other=0)
        source = m + block * SIZE * SIZE + index
        first = tl.load(source, mask=inside, other=0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0).to(tl.float32)
        sum_first += first * c - second * s
        sum_second += second * c + first * s
    tl.store(total + index, sum_first.to(total.dtype.element_ty), mask=inside)
    tl.store(total + index + half, sum_second.to(total.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------
# Launching


def _ceil(n: int, unit: int) -> int:
    """n / unit, rounded up. Triton's own function takes as long as a launch."""
    return -(-n // unit)


def _power_of_2(n: int) -> int:
    """The next one that is not below n; for the same reason."""
    return 1 << (n - 1).bit_length()


def _launch(
    kernel: Any, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], values: tuple[int, ...], constants: tuple
) -> None:
    """Run a kernel of (tensors, values, constants); nothing where the grid is empty.

    `kernel[grid](...)` looks at every argument anew, which takes longer than a small kernel. Of what it looks at,
    only dtypes and alignment can differ here.
    """
    if 0 in grid:
        return
    first, second = tensors[:2]
    with torch.cuda.device_of(first):
        if isinstance(kernel, InterpretedFunction) or (first.data_ptr() | second.data_ptr()) % 16:
            kernel[grid](*tensors, *values, *constants)
        else:
            compiled = _compiled(kernel, first.get_device(), first.dtype, second.dtype, len(tensors) > 2, constants)
            compiled[grid](*tensors, *values, *constants)


@cache
def _compiled(kernel: Any, device: int, first: torch.dtype, second: torch.dtype, turns: bool, constants: tuple) -> Any:
    """For tensors at multiples of 16 bytes.

    Args:
        turns: two tables in fp32 follow; default: (tokens, dropped, seed), the seed of 64 bits.
    """
    others = (torch.float32, torch.float32) if turns else (1, 1, 1 << 62)
    return kernel.warmup(first, second, *others, *constants, grid=(1,))


def works(device: torch.device) -> None:
    """Raises what Triton raises on a device that it has no code for, or a machine without a C compiler."""
    if sum_groups(torch.ones(1, 16, device=device), 8, False, False).sum().item() != 16:
        raise RuntimeError("a sum of Triton's came out wrong")
