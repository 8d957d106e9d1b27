"""The parameter-free operators of MoRA: how x is compressed to the size of M, and M's output decompressed.

Shape suffixes of tensors:
    B   any number of batch dimensions
    K   in_features of the layer (k in the paper)
    D   out_features of the layer (d in the paper)
    R   r_hat, the size of the square matrix M
    N   number of blocks of R values that x is cut into

All functions are pure: they hold no state and no parameters, are linear in x, and work on every dtype and
device. Where R does not divide K or D, they do what the authors' code does, since that made the paper's
numbers: x is padded with its own first values (it wraps around), and the output is repeated and cut. Sharing in
contiguous blocks needs neither: its groups differ by one member where R does not divide the side.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Grouping = Literal["strided", "blocked"]
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """The sizes that an operator works with.

    Args:
        in_features: K.
        out_features: D.
        size: R, the number of rows and columns of M; 1 <= R <= min(K, D).
        in_grouping: sharing only: which values of x are summed, see [`sharing_compress`].
        out_grouping: sharing only: which outputs share a value.

    `blocks` is N: the blocks of x that reach the output. Where K > D, blocks whose output would be cut are left out.

    Raises ValueError: a size outside of these bounds, an unknown grouping.
    """

    in_features: int
    out_features: int
    size: int
    in_grouping: Grouping = "strided"
    out_grouping: Grouping = "strided"
    blocks: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.size <= min(self.in_features, self.out_features):
            raise ValueError(
                f"`size` should be between 1 and {min(self.in_features, self.out_features)} for a layer of "
                f"{self.in_features} inputs and {self.out_features} outputs, got {self.size}."
            )
        for side in ("in_grouping", "out_grouping"):
            if getattr(self, side) not in get_args(Grouping):
                raise ValueError(f"`{side}` should be 'strided' or 'blocked', got {getattr(self, side)!r}.")
        blocks = ceil(min(self.in_features, self.out_features) / self.size)
        object.__setattr__(self, "blocks", blocks)  # read often, and the dataclass is frozen


class DenseForm(Protocol):
    """M_RR -> the D x K matrix of the update, linear in M."""

    def __call__(self, m_RR: Tensor, layout: Layout) -> Tensor: ...


class AddDelta(Protocol):
    """out = weight + alpha times the D x K matrix of the update, rounded once; `out` may be the weight."""

    def __call__(self, weight_DK: Tensor, m_RR: Tensor, layout: Layout, alpha: float, out_DK: Tensor) -> None: ...


@dataclass(frozen=True)
class Operator:
    """A pair of functions around M, and the weight that they add up to.

    Args:
        name: how `MoraConfig(operator=...)` names it.
        compress: x_BK -> x_BR, or x_BNR for an operator that applies M to several blocks. Both functions have to
            be linear and to map zero to zero; merging and disabling rely on it.
        decompress: M's output, of the shape that `compress` gave, -> y_BD.
        delta_weight: M_RR -> the D x K matrix of `decompress(M @ compress(x))`. Default: the functions
            applied to the K unit vectors, which is right for any linear pair, at the price of K forward passes
            in one batch.
        even: R has to be even; it is rounded down.
        add_delta: adds that matrix to a weight without building it, in fewer passes; `delta_weight` is then not
            called. Default: by `delta_weight`.
    """

    name: str
    compress: Callable[[Tensor, Layout], Tensor]
    decompress: Callable[[Tensor, Layout], Tensor]
    delta_weight: DenseForm | None = None
    even: bool = False
    add_delta: AddDelta | None = None

    def __call__(self, x_BK: Tensor, m_RR: Tensor, layout: Layout) -> Tensor:
        """decompress(M compress(x)): y_BD."""
        return self.decompress(torch.nn.functional.linear(self.compress(x_BK, layout), m_RR), layout)

    def dense(self, m_RR: Tensor, layout: Layout) -> Tensor:
        """The D x K matrix that this operator and M add to the layer's weight."""
        if self.add_delta is not None:
            delta_DK = m_RR.new_zeros(layout.out_features, layout.in_features)
            self.add_delta(delta_DK, m_RR, layout, 1, delta_DK)
            return delta_DK
        if self.delta_weight is not None:
            return self.delta_weight(m_RR, layout).contiguous()
        unit_KK = torch.eye(layout.in_features, dtype=m_RR.dtype, device=m_RR.device)
        return self(unit_KK, m_RR, layout).T.contiguous()

    def add_to(self, weight_DK: Tensor, m_RR: Tensor, layout: Layout, alpha: float, out_DK: Tensor) -> None:
        """out = weight + alpha times the matrix that [`dense`] gives; `out` may be the weight."""
        if self.add_delta is not None:
            self.add_delta(weight_DK, m_RR, layout, alpha, out_DK)
        else:
            torch.add(weight_DK, self.dense(m_RR, layout), alpha=alpha, out=out_DK)

    def size(self, in_features: int, out_features: int, r: int) -> int:
        """R of a layer: round(sqrt((D + K) r)), so that M has the parameters of a LoRA of rank r.

        Rounded down to an even number where the operator needs one, which never exceeds that budget by more.
        """
        size = int(((in_features + out_features) * r) ** 0.5 + 0.5)
        return size - size % 2 if self.even else size

    def largest_size(self, in_features: int, out_features: int) -> int:
        """The largest R that fits a layer: min(K, D), even where the operator needs it; 0 where none does."""
        largest = min(in_features, out_features)
        return largest - largest % 2 if self.even else largest

    def largest_rank(self, in_features: int, out_features: int) -> int:
        """The largest r whose R fits a layer; 0 where none does."""
        largest = self.largest_size(in_features, out_features)
        if largest == 0:
            return 0
        r = (largest + 1) ** 2 // (in_features + out_features) + 1
        while r > 0 and self.size(in_features, out_features, r) > largest:
            r -= 1
        return r


# ---------------------------------------------------------------------------------------------------
# Truncation, Equation 4


def truncation_compress(x_BK: Tensor, layout: Layout) -> Tensor:
    """The first R values."""
    return x_BK[..., : layout.size]


def truncation_decompress(y_BR: Tensor, layout: Layout) -> Tensor:
    """Zeros behind the R values."""
    return torch.nn.functional.pad(y_BR, (0, layout.out_features - layout.size))


def truncation_add_delta(weight_DK: Tensor, m_RR: Tensor, layout: Layout, alpha: float, out_DK: Tensor) -> None:
    """M is added to the upper left corner."""
    if out_DK is not weight_DK:
        out_DK.copy_(weight_DK)
    out_DK[: layout.size, : layout.size].add_(m_RR, alpha=alpha)


# ---------------------------------------------------------------------------------------------------
# Sharing, Equation 6


def _balanced(features: int, size: int) -> tuple[int, int]:
    """Contiguous groups that differ by one at most: (members of each, how many groups have one more)."""
    return divmod(features, size)


def sharing_compress(x_BK: Tensor, layout: Layout) -> Tensor:
    """The sum over each of R groups of values.

    strided: the group of value j is j mod R, over x padded with its own first values to a multiple of R.
    blocked: contiguous groups, without padding; the first K mod R groups have one member more.
    """
    size = layout.size
    if layout.in_grouping == "strided":
        return sum_repeated(x_BK, size, wrap=True)
    members, larger = _balanced(layout.in_features, size)
    if larger == 0:
        return x_BK.unflatten(-1, (size, members)).sum(dim=-1)
    split = larger * (members + 1)
    first = x_BK[..., :split].unflatten(-1, (larger, members + 1)).sum(dim=-1)
    rest = x_BK[..., split:].unflatten(-1, (size - larger, members)).sum(dim=-1)
    return torch.cat((first, rest), dim=-1)


def sharing_decompress(y_BR: Tensor, layout: Layout) -> Tensor:
    """Every output takes the value of its group; groups as in [`sharing_compress`], repeated and cut if strided."""
    if layout.out_grouping == "strided":
        return _repeat(y_BR, layout.out_features)
    members, larger = _balanced(layout.out_features, layout.size)
    if larger == 0:
        return y_BR.repeat_interleave(members, dim=-1)
    first = y_BR[..., :larger].repeat_interleave(members + 1, dim=-1)
    return torch.cat((first, y_BR[..., larger:].repeat_interleave(members, dim=-1)), dim=-1)


def sharing_compress_adjoint(c_BR: Tensor, layout: Layout) -> Tensor:
    """The transpose of [`sharing_compress`] as a matrix, times c: x's gradient from its compressed form's, B x K."""
    size, in_features = layout.size, layout.in_features
    if layout.in_grouping == "blocked":
        return sharing_decompress(c_BR, _mirrored(layout))
    x_BK = _repeat(c_BR, in_features).contiguous()
    if past := in_features % size:
        x_BK[..., : size - past] += c_BR[..., past:]
    return x_BK


def sharing_decompress_adjoint(y_BD: Tensor, layout: Layout) -> Tensor:
    """The transpose of [`sharing_decompress`] as a matrix, times y: the sum over each group of outputs, B x R."""
    if layout.out_grouping == "blocked":
        return sharing_compress(y_BD, _mirrored(layout))
    return sum_repeated(y_BD, layout.size)


def sharing_add_delta(weight_DK: Tensor, m_RR: Tensor, layout: Layout, alpha: float, out_DK: Tensor) -> None:
    """Entry (i, j) is M at (group of output i, group of input j); inputs that wrap around belong to two groups."""
    m_RK = sharing_compress_adjoint(m_RR, layout)  # each row of M is a function of the compressed x
    if layout.out_grouping == "strided":
        add_repeated(weight_DK.T, m_RK.T, alpha, None if out_DK is weight_DK else out_DK.T)
    else:
        if out_DK is not weight_DK:
            out_DK.copy_(weight_DK)
        out_DK.add_(sharing_decompress(m_RK.T, layout).T, alpha=alpha)


def _mirrored(layout: Layout) -> Layout:
    """Inputs in place of outputs, and outputs in place of inputs."""
    return Layout(layout.out_features, layout.in_features, layout.size, layout.out_grouping, layout.in_grouping)


# ---------------------------------------------------------------------------------------------------
# Decoupling, Equation 8, and rotation, Equation 9


def decoupling_compress(x_BK: Tensor, layout: Layout) -> Tensor:
    """x in N blocks of R values, padded with its own first values."""
    return _wrap(x_BK, layout.blocks, layout.size)


def decoupling_decompress(y_BNR: Tensor, layout: Layout) -> Tensor:
    """The blocks' outputs one behind the other, cut at D, or repeated from the start and cut.

    Block n of x reaches the outputs n R to (n + 1) R - 1 alone. So where K > D, values of x from
    ceil(D / R) R on are not read, as in the authors' code.
    """
    return _repeat(y_BNR.flatten(-2), layout.out_features)


def decoupling_matrices(m_RR: Tensor, layout: Layout) -> Tensor:
    """The matrix that each block of x is multiplied by, N x R x R: M."""
    return m_RR.expand(layout.blocks, -1, -1)


def decoupling_matrices_adjoint(m_NRR: Tensor, layout: Layout) -> Tensor:
    """The gradient of M from those of the blocks' matrices, R x R."""
    return m_NRR.sum(dim=0)


def decoupling_add_delta(weight_DK: Tensor, m_RR: Tensor, layout: Layout, alpha: float, out_DK: Tensor) -> None:
    """M on the diagonal, once for each block, wrapped, repeated and cut as x and the output are."""
    if out_DK is not weight_DK:
        out_DK.copy_(weight_DK)
    _add_blocks(out_DK, decoupling_matrices(m_RR, layout), layout, alpha)


def rotation_compress(x_BK: Tensor, layout: Layout) -> Tensor:
    """Blocks as in decoupling, block n rotated by the angles n theta_j, so that M can tell blocks apart.

    theta_j = 10000^(-2 (j - 1) / R) for j = 1 .. R / 2; n counts from 0; value j of a block is paired with
    value j + R / 2.

    Raises ValueError where R is odd.
    """
    if layout.size % 2:
        raise ValueError(f"Rotation pairs values, and needs an M of even size, got {layout.size}.")
    return _turn(decoupling_compress(x_BK, layout), *_angles(layout, x_BK))


def rotation_matrices(m_RR: Tensor, layout: Layout) -> Tensor:
    """The matrix that each block of x is multiplied by, N x R x R: M R_n, M turned against the block's rotation."""
    # M (R_n x) = (M R_n) x: the rows of M turn the other way.
    cos, sin = (table[:, None] for table in _angles(layout, m_RR))
    return _turn(m_RR, cos, -sin)


def rotation_matrices_adjoint(m_NRR: Tensor, layout: Layout) -> Tensor:
    """The gradient of M from those of the blocks' matrices, R x R: each turned back, and their sum.

    Half precision is turned back and summed up in single.
    """
    if m_NRR.dtype in HALF:
        m_NRR = m_NRR.float()
    cos, sin = (table[:, None] for table in _angles(layout, m_NRR))
    return _turn(m_NRR, cos, sin).sum(dim=0)


def rotation_add_delta(weight_DK: Tensor, m_RR: Tensor, layout: Layout, alpha: float, out_DK: Tensor) -> None:
    """As decoupling's, with M turned against each block's rotation."""
    if out_DK is not weight_DK:
        out_DK.copy_(weight_DK)
    _add_blocks(out_DK, rotation_matrices(m_RR, layout), layout, alpha)


def _turn(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (j, j + R / 2) of the last dimension, turned by the angle that cos and sin are of."""
    half = v.shape[-1] // 2
    turned = v * torch.cat((cos, cos), dim=-1)
    turned[..., :half].addcmul_(v[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(v[..., :half], sin)
    return turned


def _angles(layout: Layout, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles n theta_j, each (N, R / 2), computed in fp32 and cast to the dtype of `like`.

    Kept for later calls, outside of the layer: nothing to save, copy or move with it.
    """
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return _angle_tables(layout.size, layout.blocks, like.device, like.dtype)
    return _kept_angle_tables(layout.size, layout.blocks, like.device, like.dtype)


def rotation_angles(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles n theta_j, each (N, R / 2), in fp32; kept for later calls."""
    return _kept_angle_tables(layout.size, layout.blocks, device, torch.float32)


def _angle_tables(size: int, blocks: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    theta = 10000.0 ** (-torch.arange(size // 2, device=device, dtype=torch.float32) / (size // 2))
    angle = torch.outer(torch.arange(blocks, device=device, dtype=torch.float32), theta)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@lru_cache(maxsize=256)
def _kept_angle_tables(size: int, blocks: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # a later training step may read the tables of an earlier inference
        return _angle_tables(size, blocks, device, dtype)


def _add_blocks(weight_DK: Tensor, m_NRR: Tensor, layout: Layout, alpha: float) -> None:
    """weight += alpha times the matrix that applies matrix n to block n of x, for the n-th block of the output."""
    size, in_features = layout.size, layout.in_features
    for row in range(0, layout.out_features, size):
        block = row // size % layout.blocks
        rows_DK = weight_DK[row : row + size]
        m_DR = m_NRR[block, : len(rows_DK)]
        first = block * size
        inside = min(size, in_features - first)
        rows_DK[:, first : first + inside].add_(m_DR[:, :inside], alpha=alpha)
        if inside < size:  # the last block wraps around; it is not the first, for R <= K
            rows_DK[:, : size - inside].add_(m_DR[:, inside:], alpha=alpha)


# ---------------------------------------------------------------------------------------------------
# Padding by wrapping around, cutting, repeating


def _wrap(x_BK: Tensor, blocks: int, size: int) -> Tensor:
    """The first `blocks * size` values of x repeated endlessly, as (..., blocks, size)."""
    missing = blocks * size - x_BK.shape[-1]
    if missing > 0:
        x_BK = torch.cat((x_BK, x_BK[..., :missing]), dim=-1)
    return x_BK[..., : blocks * size].unflatten(-1, (blocks, size))


def _repeat(y: Tensor, features: int) -> Tensor:
    """The first `features` of y's values repeated endlessly."""
    times = ceil(features / y.shape[-1])
    if times > 1:
        y = y.repeat(*[1] * (y.dim() - 1), times)
    return y[..., :features]


def add_repeated(
    y: Tensor, values: Tensor, alpha: float = 1, out: Tensor | None = None, factor: Tensor | None = None
) -> None:
    """out = y + alpha times the values, repeated endlessly and cut, and never built so; by default in place.

    Args:
        factor: of y's shape; the repeated values are multiplied by it. In place alone.
    """
    features, size = y.shape[-1], values.shape[-1]
    whole = features // size * size
    parts = [(slice(0, whole), values.unsqueeze(-2)), (slice(whole, features), values[..., None, : features - whole])]
    for part, added in parts:
        if part.start == part.stop:
            continue
        y_part = y[..., part].unflatten(-1, (-1, added.shape[-1]))
        if factor is not None:
            y_part.addcmul_(added, factor[..., part].unflatten(-1, (-1, added.shape[-1])), value=alpha)
        elif out is None:
            y_part.add_(added, alpha=alpha)
        else:
            torch.add(y_part, added, alpha=alpha, out=out[..., part].unflatten(-1, (-1, added.shape[-1])))


def sum_repeated(y: Tensor, size: int, wrap: bool = False) -> Tensor:
    """The sums of the values of equal index modulo `size`: the transpose of repeating and cutting.

    Args:
        wrap: y is padded with its own first values to a multiple of `size`.
    """
    times, over = divmod(int(y.shape[-1]), size)  # torch.jit traces a size as a tensor
    if times <= 3:  # a sum over so few is slower than their additions
        total = y[..., :size].clone()
        for start in range(size, times * size, size):
            total += y[..., start : start + size]
    else:
        total = y[..., : times * size].unflatten(-1, (times, size)).sum(dim=-2)
    if over:
        total[..., :over] += y[..., times * size :]
        if wrap:
            total[..., over:] += y[..., : size - over]
    return total


# ---------------------------------------------------------------------------------------------------
# The registry

_OPERATORS: dict[str, Operator] = {}


def register_operator(operator: Operator, *, overwrite: bool = False) -> Operator:
    """Make an operator known to `MoraConfig(operator=operator.name)`; returns it.

    A saved adapter names its operator, so that the code that loads it has to register it first.

    Raises ValueError where the name is taken and `overwrite` is false, or is no identifier; TypeError where the
    argument is no `Operator`, or its functions can't be called.
    """
    if not isinstance(operator, Operator):
        raise TypeError(f"register_operator takes a mora.Operator, got a {type(operator).__name__}.")
    for part in ("compress", "decompress", "delta_weight"):
        function = getattr(operator, part)
        if not callable(function) and not (part == "delta_weight" and function is None):
            raise TypeError(f"`{part}` of operator {operator.name!r} should be a function, got {function!r}.")
    if not operator.name.isidentifier():
        raise ValueError(f"An operator's name has to be an identifier, got {operator.name!r}.")
    if operator.name in _OPERATORS and not overwrite:
        raise ValueError(f"There is an operator {operator.name!r} already; pass overwrite=True to replace it.")
    _OPERATORS[operator.name] = operator
    return operator


def get_operator(name: str) -> Operator:
    """The operator of that name. Raises ValueError with the known names where there is none."""
    if name not in _OPERATORS:
        near = difflib.get_close_matches(name, _OPERATORS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown MoRA operator {name!r}.{hint} Known operators: {', '.join(sorted(_OPERATORS))}. One of your "
            f"own has to be registered before the adapter is made or loaded: mora.register_operator(...)."
        )
    return _OPERATORS[name]


register_operator(Operator("truncation", truncation_compress, truncation_decompress, add_delta=truncation_add_delta))
register_operator(Operator("sharing", sharing_compress, sharing_decompress, add_delta=sharing_add_delta))
register_operator(Operator("decoupling", decoupling_compress, decoupling_decompress, add_delta=decoupling_add_delta))
register_operator(
    Operator("rotation", rotation_compress, decoupling_decompress, even=True, add_delta=rotation_add_delta)
)
