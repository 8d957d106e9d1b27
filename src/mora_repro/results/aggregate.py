"""From records to the rows of a table: which records belong to a cell, and their mean and interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from ..spec.table import FIRST_SEARCH_SEED, Cell
from .records import Record

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values with the half-width of its 95 % t-interval: infinite for one value, which bounds nothing."""

    mean: float
    half: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Raises ValueError for no values."""
        n = len(values)
        if n == 0:
            raise ValueError("an interval needs at least one value")
        half = stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) if n > 1 else math.inf
        return cls(math.fsum(values) / n, float(half), n)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


@dataclass(frozen=True)
class CellResult:
    """A cell with its finished records, by seed; none where it has not run."""

    cell: Cell
    records: dict[int, Record]

    @property
    def trainable(self) -> int | None:
        """The number of trainable parameters; None where no record has it."""
        return next((record.parameters.trainable for record in self.records.values() if record.parameters), None)

    def at_step(self, metric: str, step: int) -> Interval | None:
        """The metric at an evaluation step over the seeds; None where no record has it."""
        found = [_values(record, metric) for record in self.records.values()]
        values = [by_step[step] for by_step in found if step in by_step]
        return Interval.of(values) if values else None

    def mean_by_seed(self, metric: str, steps: Sequence[int]) -> dict[int, float]:
        """The metric averaged over `steps`, for every seed that has all of them: higher is learnt earlier."""
        found = {seed: _values(record, metric) for seed, record in self.records.items()}
        return {
            seed: math.fsum(by_step[step] for step in steps) / len(steps)
            for seed, by_step in found.items()
            if set(steps) <= by_step.keys()
        }


def _values(record: Record, metric: str) -> dict[int, float]:
    """The metric by evaluation step."""
    return {each.step: each.metrics[metric] for each in record.evaluations if metric in each.metrics}


def collect(cells: Sequence[Cell], records: Sequence[Record]) -> list[CellResult]:
    """The finished records of each cell: those of its recipe as it stands, with any seed but a search's.

    A record of the same method and rank with other settings (a try of the rate search, an override) has
    another identity and is left out; so is one made with a recipe that has changed since.
    """
    finished = {record.id: record for record in records if record.status == "finished"}
    results = []
    for cell in cells:
        seeds = {record.spec.seed for record in finished.values() if _is_near(record, cell)}
        ids = {seed: cell.spec(seed).id for seed in sorted(seeds) if seed < FIRST_SEARCH_SEED}
        results.append(CellResult(cell, {seed: finished[id_] for seed, id_ in ids.items() if id_ in finished}))
    return results


def _is_near(record: Record, cell: Cell) -> bool:
    """Whether it is the cell's method and rank at all: composing a cell for every other seed too would be slow."""
    spec = record.spec
    return (spec.method.name, spec.r, spec.task["name"], spec.scale) == (cell.method, cell.r, cell.task, cell.scale)


def leader(intervals: Sequence[Interval | None]) -> int | None:
    """The index of the one whose interval lies wholly above all others'; None where there is no such one.

    None stands for a row that has not run, and is passed over. A single value's interval is infinite, so nothing is
    apart from it.
    """
    known = {index: interval for index, interval in enumerate(intervals) if interval is not None}
    if len(known) < 2:
        return None
    best = max(known, key=lambda index: known[index].mean)
    reach = max(interval.high for index, interval in known.items() if index != best)
    return best if known[best].low > reach else None


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Interval | None:
    """ours - theirs over the seeds that both have; None where there are none."""
    both = sorted(ours.keys() & theirs.keys())
    return Interval.of([ours[seed] - theirs[seed] for seed in both]) if both else None
