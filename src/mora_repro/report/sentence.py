"""What Table 2 shows of the paper's claim that MoRA memorises faster than LoRA, in a sentence."""

from __future__ import annotations

from ..results.aggregate import Interval, paired_difference
from ..spec.table import ranks
from .table2 import METRIC, Row, Table2


def sentence(table: Table2, out: str = "results") -> str:
    """MoRA against LoRA at the low rank and at the high one: the difference in character accuracy, averaged
    over the table's steps and paired by seed, and whether the paper's has the same direction.

    The claim `holds` where the difference's 95 % t-interval lies above 0, `does not hold` where it lies below, and
    else the seeds `cannot tell`. A single seed has no interval: it shows a direction alone. Where a rank has fewer
    than two seeds, a last line has the command that makes three, into `out`.
    """
    low, high = (ranks(table.scale)[name][0] for name in ("low", "high"))
    differences = {r: _difference(table, r) for r in (low, high)}
    parts = "; ".join(_part(table, r, ours) for r, ours in differences.items())
    text = f"That MoRA learns faster than LoRA (accuracy averaged over the steps): {parts}."
    if all(ours is not None and ours.n > 1 for ours in differences.values()):
        return text
    where = "" if out == "results" else f" out={out}"
    return f"{text} With three seeds:\n  python scripts/sweep.py table=2 scale={table.scale} seeds=3{where}"


def _difference(table: Table2, r: int) -> Interval | None:
    """MoRA - LoRA at a rank, in points of accuracy; None where no seed has run with both."""
    lora, mora = (table.row(method, r).result.mean_by_seed(METRIC, table.steps) for method in ("lora", "mora"))
    return paired_difference(mora, lora)


def _part(table: Table2, r: int, ours: Interval | None) -> str:
    if ours is None:
        return f"at r={r}, no seed has run with both"
    theirs = _mean(table.row("mora", r)) - _mean(table.row("lora", r))
    paper = f"{'as in' if ours.mean * theirs > 0 else 'unlike'} the paper ({theirs:+.1f})"
    way = "ahead" if ours.mean > 0 else "behind" if ours.mean < 0 else "apart"
    points = f"MoRA {abs(ours.mean):.1f} points {way}"
    if ours.n == 1:
        return f"at r={r}, one seed cannot tell it from chance, {points}, {paper}"
    interval = f"95 % interval {ours.low:+.1f} to {ours.high:+.1f}, {ours.n} seeds"
    verdict = "holds" if ours.low > 0 else "does not hold" if ours.high < 0 else f"{ours.n} seeds cannot tell"
    return f"at r={r}, {verdict}, {points} ({interval}), {paper}"


def _mean(row: Row) -> float:
    """The paper's accuracy averaged over its steps."""
    values = [value for value in row.paper if value is not None]
    return sum(values) / len(values)
