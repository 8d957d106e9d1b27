"""The operators' training step on a GPU: what surrounds the products with M, in one pass each.

PyTorch's own operations take several passes for it, or one that reads value by value, and keep a mask for dropout's
backward pass. Imported where it is first needed, since Triton may be absent: `kernel_of` in kernels.py.

Shape suffixes as in kernels.py, and
    F   features: K or D
    W   width: R, rounded up to what a GPU's matrix units read at once (16 bytes); the values behind R are zeros
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton import knobs

from .dropout import FACTOR, LEVELS, STEP, VALUES, Mask
from .kernels import BlockKernel, SharingKernel
from .operators import Layout, rotation_angles

# Values of a tile, and its columns at most; as measured on an H100.
_SUM_TILE, _ADD_TILE, _TURN_TILE, _COLUMNS = 1024, 2048, 512, 512

_INTERPRETED_OR_AMD = knobs.runtime.interpret or torch.version.hip is not None

# As Triton reads a global.
_FACTOR, _STEP = tl.constexpr(FACTOR), tl.constexpr(STEP)
_VALUES, _BITS = tl.constexpr(VALUES), tl.constexpr(64 // VALUES)
_ALL, _SIGN = tl.constexpr(LEVELS - 1), tl.constexpr(LEVELS // 2)


# ---------------------------------------------------------------------------------------------------
# The operators


class TritonSharing(SharingKernel):
    """Sums over groups and their transpose in one pass over the tokens, with dropout in it; products of width W."""

    scales = True

    def drops(self, device: torch.device) -> bool:
        return True

    def _matrix(self, m_RR: Tensor) -> Tensor:
        missing = _width(len(m_RR), m_RR) - len(m_RR)
        return pad(m_RR, (0, missing, 0, missing)) if missing else m_RR

    def _compressed(self, x_TK: Tensor, layout: Layout, mask: Mask | None) -> Tensor:
        return sum_groups(x_TK, _inputs(layout), mask).squeeze(1)

    def _add_decompressed(self, y_TD: Tensor, u_TW: Tensor, layout: Layout) -> None:
        add_to_groups(y_TD, u_TW, _outputs(layout))

    def _decompressed_adjoint(self, g_TD: Tensor, layout: Layout) -> Tensor:
        return sum_groups(g_TD, _outputs(layout)).squeeze(1)

    def _compressed_adjoint(self, c_TW: Tensor, layout: Layout, onto_TK: Tensor | None, mask: Mask | None) -> Tensor:
        x_TK = c_TW.new_empty(len(c_TW), layout.in_features) if onto_TK is None else onto_TK
        add_to_groups(x_TK, c_TW, _inputs(layout), mask, fresh=onto_TK is None)
        return x_TK


class TritonBlocks(BlockKernel):
    """Decoupling and rotation. Blocks that a GPU's matrix units can't read where they lie are copied, of width W.

    Those are blocks of an R that is no multiple of 16 bytes, and those with something to do on the way: dropout, or
    outputs that are repeated.
    """

    scales = True

    def drops(self, device: torch.device) -> bool:
        return True

    def add_(self, y_TD: Tensor, x_TK: Tensor, m_RR: Tensor, layout: Layout, mask: Mask | None) -> Tensor:
        if mask is None and _lies_well(layout, x_TK):
            return super().add_(y_TD, x_TK, m_RR, layout, mask)
        x_TNW = sum_groups(x_TK, _input_blocks(layout), mask)
        u_TNW = _products(x_TNW, self._matrices_of_width(m_RR, layout).mT)
        add_to_groups(y_TD, u_TNW, _output_blocks(layout))
        return x_TK

    def gradients(
        self,
        g_TD: Tensor,
        kept: Tensor | None,
        m_RR: Tensor | None,
        layout: Layout,
        onto_TK: Tensor | None,
        mask: Mask | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        if mask is None and _lies_well(layout, g_TD):
            return super().gradients(g_TD, kept, m_RR, layout, onto_TK, mask)
        g_TNW = sum_groups(g_TD, _output_blocks(layout))
        x_grad = m_grad = None
        if m_RR is not None:
            c_TNW = _products(g_TNW, self._matrices_of_width(m_RR, layout))
            blocks, x_grad = _input_blocks(layout), onto_TK
            if x_grad is None:
                x_grad = g_TD.new_empty(len(g_TD), layout.in_features)
                x_grad[:, blocks.features :] = 0  # not read
            add_to_groups(x_grad, c_TNW, blocks, mask, fresh=onto_TK is None)
        if kept is not None:
            x_TNW = sum_groups(kept, _input_blocks(layout), mask)
            m_NWW = torch.bmm(g_TNW.permute(1, 2, 0), x_TNW.transpose(0, 1))
            m_grad = self.matrices_adjoint(m_NWW[:, : layout.size, : layout.size], layout).to(kept.dtype)
        return x_grad, m_grad

    def _matrices_of_width(self, m_RR: Tensor, layout: Layout) -> Tensor:
        m_NRR = self.matrices(m_RR, layout)
        missing = _width(layout.size, m_RR) - layout.size
        return pad(m_NRR, (0, missing, 0, missing)) if missing else m_NRR


def _products(x_TNW: Tensor, m_NWW: Tensor) -> Tensor:
    """Each block times its matrix, T x N x W."""
    y_TNW = torch.empty_like(x_TNW)
    y_TNW.transpose(0, 1).baddbmm_(x_TNW.transpose(0, 1), m_NWW, beta=0)
    return y_TNW


def _lies_well(layout: Layout, t: Tensor) -> bool:
    """Every block begins at a multiple of 16 bytes from the tensor's first value; and no output is repeated."""
    sides = (layout.size, layout.in_features, layout.out_features)
    return layout.out_features <= layout.blocks * layout.size and all(_width(side, t) == side for side in sides)


def _width(size: int, like: Tensor) -> int:
    """W for tensors of that dtype."""
    unit = 16 // like.element_size()
    return _ceil(size, unit) * unit


# ---------------------------------------------------------------------------------------------------
# Sums over groups


class Groups(NamedTuple):
    """Which of the first F values of a row belong together, in N blocks of R groups.

    Strided: value f belongs to group f mod N R. Blocked: the groups are contiguous, and the first F mod R have one
    member more. As in operators.py (`sharing_compress`); a block of x is one of groups of one value each.

    Args:
        features: F; what a row has behind them is not read.
        length: R.
        blocks: N; 1 where blocked.
        wrap: strided groups are those of the row padded with its own first values to a multiple of N R.
    """

    features: int
    length: int
    blocks: int = 1
    blocked: bool = False
    wrap: bool = False


def _inputs(layout: Layout) -> Groups:
    blocked = layout.in_grouping == "blocked"
    return Groups(layout.in_features, layout.size, blocked=blocked, wrap=not blocked)


def _outputs(layout: Layout) -> Groups:
    return Groups(layout.out_features, layout.size, blocked=layout.out_grouping == "blocked")


def _input_blocks(layout: Layout) -> Groups:
    features = min(layout.in_features, layout.blocks * layout.size)
    return Groups(features, layout.size, layout.blocks, wrap=True)


def _output_blocks(layout: Layout) -> Groups:
    return Groups(layout.out_features, layout.size, layout.blocks)


def sum_groups(x_TF: Tensor, groups: Groups, mask: Mask | None = None) -> Tensor:
    """The sum over each group of values, T x N x W in x's dtype, summed up in fp32.

    Args:
        mask: of a dropout of x, whose scale is in the sums; default: none.
    """
    x_TF = x_TF.contiguous()
    sums_TNW = x_TF.new_empty(len(x_TF), groups.blocks, _width(groups.length, x_TF))
    _over_groups(_sum_groups, _SUM_TILE, x_TF, sums_TNW, groups, mask)
    return sums_TNW


def add_to_groups(y_TF: Tensor, values: Tensor, groups: Groups, mask: Mask | None = None, fresh: bool = False) -> None:
    """y += the value of each one's group, or nothing where dropped, in place: the transpose of [`sum_groups`].

    Args:
        y_TF: contiguous.
        values: of the shape that `sum_groups` gives, or without N where that is 1.
        mask: of a dropout, whose scale is in what is added; default: none.
        fresh: y is written, and what it held before is not read.
    """
    assert y_TF.is_contiguous()
    _over_groups(_add_to_groups, _ADD_TILE, y_TF, values.contiguous(), groups, mask, fresh)


def _over_groups(
    kernel: Any, tile: int, x_TF: Tensor, values: Tensor, groups: Groups, mask: Mask | None, *fresh: bool
) -> None:
    (tokens, stride), width = x_TF.shape, values.shape[-1]
    columns = min(_COLUMNS, _power_of_2(width))
    rows = tile // columns
    dropout = (mask.scale, mask.dropped, mask.seed) if mask else (1.0, 0, 0)
    constants = (stride, *groups, width, mask is not None, rows, columns, *fresh)
    grid = (_ceil(tokens, rows), _ceil(width, columns), groups.blocks)
    _launch(kernel, grid, (x_TF, values), (tokens, *dropout), constants)


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
def _tile(
    tokens,
    STRIDE: tl.constexpr,
    FEATURES: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of this program: tokens, columns, their groups, which are inside, where a group's first value lies, and the step
    from there to the next."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    group = tl.program_id(2) * LENGTH + column
    inside = (token < tokens) & (column < LENGTH)
    size: tl.constexpr = LENGTH * BLOCKS
    step: tl.constexpr = 1 if BLOCKED else size
    first = group * (FEATURES // size) + tl.minimum(group, FEATURES % size) if BLOCKED else group
    return token, column, group, inside, token * STRIDE + first, step


@triton.jit
def _read(x, index, inside, seed, dropped, MASKED: tl.constexpr):
    """Values at the index, in fp32; 0 where it is not inside, or dropped."""
    value = tl.load(x + index, mask=inside, other=0).to(tl.float32)
    if MASKED:
        value = tl.where(_kept(index, seed, dropped), value, 0.0)
    return value


@triton.jit(do_not_specialize=["tokens", "scale", "dropped", "seed"])
def _sum_groups(
    x,
    sums,
    tokens,
    scale,
    dropped,
    seed,
    STRIDE: tl.constexpr,
    FEATURES: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKED: tl.constexpr,
    WRAP: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token, column, group, inside, index, step = _tile(tokens, STRIDE, FEATURES, LENGTH, BLOCKS, BLOCKED, ROWS, COLUMNS)
    size: tl.constexpr = LENGTH * BLOCKS
    whole: tl.constexpr = FEATURES // size
    past: tl.constexpr = FEATURES % size
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for member in tl.range(0, whole, loop_unroll_factor=4):
        total += _read(x, index + member * step, inside, seed, dropped, MASKED)
    if past > 0:
        total += _read(x, index + whole * step, inside & (group < past), seed, dropped, MASKED)
        if WRAP:
            total += _read(x, index - past, inside & (group >= past), seed, dropped, MASKED)
    if MASKED:
        total *= scale
    out = sums + (token * BLOCKS + tl.program_id(2)) * WIDTH + column
    tl.store(out, total.to(sums.dtype.element_ty), mask=(token < tokens) & (column < WIDTH))


@triton.jit
def _add(y, index, value, inside, seed, dropped, MASKED: tl.constexpr, FRESH: tl.constexpr):
    if MASKED:
        value = tl.where(_kept(index, seed, dropped), value, 0.0)
    if not FRESH:
        value += tl.load(y + index, mask=inside, other=0).to(tl.float32)
    tl.store(y + index, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "scale", "dropped", "seed"])
def _add_to_groups(
    y,
    values,
    tokens,
    scale,
    dropped,
    seed,
    STRIDE: tl.constexpr,
    FEATURES: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKED: tl.constexpr,
    WRAP: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FRESH: tl.constexpr,
):
    token, column, group, inside, index, step = _tile(tokens, STRIDE, FEATURES, LENGTH, BLOCKS, BLOCKED, ROWS, COLUMNS)
    block = tl.program_id(2)
    size: tl.constexpr = LENGTH * BLOCKS
    whole: tl.constexpr = FEATURES // size
    past: tl.constexpr = FEATURES % size
    row = values + token * BLOCKS * WIDTH
    value = tl.load(row + block * WIDTH + column, mask=inside, other=0).to(tl.float32)
    if MASKED:
        value *= scale
    twice = value
    if WRAP and past > 0:  # the first values are also in the group that lies `past` further
        other = group + past
        source = row + (other // LENGTH) * WIDTH + other % LENGTH
        second = tl.load(source, mask=inside & (other < size), other=0).to(tl.float32)
        twice += second * scale if MASKED else second
    if whole > 0:
        _add(y, index, twice, inside, seed, dropped, MASKED, FRESH)
        for member in tl.range(1, whole, loop_unroll_factor=4):
            _add(y, index + member * step, value, inside, seed, dropped, MASKED, FRESH)
        if past > 0:
            _add(y, index + whole * step, value, inside & (group < past), seed, dropped, MASKED, FRESH)
    else:
        _add(y, index, twice, inside & (group < past), seed, dropped, MASKED, FRESH)


# ---------------------------------------------------------------------------------------------------
# Rotation


def rotation_matrices(m_RR: Tensor, layout: Layout) -> Tensor:
    """That of operators.py, N x R x R, in one pass."""
    m_RR = m_RR.contiguous()
    turned_NRR = m_RR.new_empty(layout.blocks, layout.size, layout.size)
    _over_matrix(_turn, m_RR, turned_NRR, layout)
    return turned_NRR


def rotation_matrices_adjoint(m_NRR: Tensor, layout: Layout) -> Tensor:
    """That of operators.py, R x R, in one pass; rows of m may lie apart."""
    total_RR = m_NRR.new_empty(layout.size, layout.size)
    _over_matrix(_turn_back, total_RR, m_NRR, layout)
    return total_RR


def _over_matrix(kernel: Any, m_RR: Tensor, m_NRR: Tensor, layout: Layout) -> None:
    assert m_NRR.stride(2) == 1 and layout.size % 2 == 0
    half = layout.size // 2
    columns = min(_COLUMNS, _power_of_2(half))
    rows = max(1, _TURN_TILE // columns)
    grid = (_ceil(layout.size, rows), _ceil(half, columns), 1)
    cos, sin = rotation_angles(layout, m_RR.device)
    constants = (layout.blocks, layout.size, m_NRR.stride(0), m_NRR.stride(1), rows, columns)
    _launch(kernel, grid, (m_RR, m_NRR, cos, sin), (), constants)


@triton.jit
def _pairs(SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile's pairs of columns (j, j + R / 2): rows, columns j, which are inside."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < SIZE) & (column < SIZE // 2)


@triton.jit
def _turn(
    m,
    turned,
    cos,
    sin,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = _pairs(SIZE, ROWS, COLUMNS)
    half: tl.constexpr = SIZE // 2
    first = tl.load(m + row * SIZE + column, mask=inside, other=0).to(tl.float32)
    second = tl.load(m + row * SIZE + column + half, mask=inside, other=0).to(tl.float32)
    for block in range(BLOCKS):
        c = tl.load(cos + block * half + column, mask=column < half, other=0)
        s = tl.load(sin + block * half + column, mask=column < half, other=0)
        out = turned + block * BLOCK_STRIDE + row * ROW_STRIDE + column
        tl.store(out, (first * c + second * s).to(turned.dtype.element_ty), mask=inside)
        tl.store(out + half, (second * c - first * s).to(turned.dtype.element_ty), mask=inside)


@triton.jit
def _turn_back(
    total,
    m,
    cos,
    sin,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, inside = _pairs(SIZE, ROWS, COLUMNS)
    half: tl.constexpr = SIZE // 2
    sum_first = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(BLOCKS):
        c = tl.load(cos + block * half + column, mask=column < half, other=0)
        s = tl.load(sin + block * half + column, mask=column < half, other=0)
        source = m + block * BLOCK_STRIDE + row * ROW_STRIDE + column
        first = tl.load(source, mask=inside, other=0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0).to(tl.float32)
        sum_first += first * c - second * s
        sum_second += second * c + first * s
    out = total + row * SIZE + column
    tl.store(out, sum_first.to(total.dtype.element_ty), mask=inside)
    tl.store(out + half, sum_second.to(total.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------
# Launching


def _ceil(n: int, unit: int) -> int:
    """n / unit, rounded up. Triton's own function takes as long as a launch."""
    return -(-n // unit)


def _power_of_2(n: int) -> int:
    """The next one that is not below n; for the same reason."""
    return 1 << (n - 1).bit_length()


def _launch(
    kernel: Any, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], values: tuple[float, ...], constants: tuple
) -> None:
    """Run a kernel of (tensors, values, constants); nothing where the grid is empty.

    `kernel[grid](...)` looks at every argument anew, which takes longer than a small kernel. Of what it looks at,
    only dtypes and alignment can differ here; for AMD's GPUs also whether a tensor is larger than 2 GiB.
    """
    if 0 in grid:
        return
    first, second = tensors[:2]
    with torch.cuda.device_of(first):
        if _INTERPRETED_OR_AMD or (first.data_ptr() | second.data_ptr()) % 16:
            kernel[grid](*tensors, *values, *constants)
        else:
            compiled = _compiled(kernel, first.get_device(), first.dtype, second.dtype, len(tensors) > 2, constants)
            compiled[grid](*tensors, *values, *constants)


@cache
def _compiled(kernel: Any, device: int, first: torch.dtype, second: torch.dtype, turns: bool, constants: tuple) -> Any:
    """For tensors at multiples of 16 bytes.

    Args:
        turns: two tables in fp32 follow; else (tokens, scale, dropped, seed), the seed of 64 bits.
    """
    others = (torch.float32, torch.float32) if turns else (1, 1.0, 1, 1 << 62)
    return kernel.warmup(first, second, *others, *constants, grid=(1,))


def works(device: torch.device) -> None:
    """Raises what Triton raises on a device that it has no code for, or a machine without a C compiler."""
    if sum_groups(torch.ones(1, 16, device=device), Groups(16, 8)).sum().item() != 16:
        raise RuntimeError("a sum of Triton's came out wrong")
