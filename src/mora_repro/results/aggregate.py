"""From records to the rows of a table: which records belong to a cell, and their mean and interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from ..spec.table import FIRST_SEARCH_SEED, Cell
from .records import Record, higher_is_better
from .search import settled

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
    """A cell with its finished records, by seed; none where it has not run.

    `searched`: they have the settings that a search of its own took, else those of its recipe.
    """

    cell: Cell
    records: dict[int, Record]
    searched: bool = False

    @property
    def trainable(self) -> int | None:
        """The number of trainable parameters; None where no record has it."""
        return next((record.parameters.trainable for record in self.records.values() if record.parameters), None)

    def by_step(self, metric: str) -> dict[int, dict[int, float]]:
        """By seed, the metric by evaluation step."""
        return {seed: _values(record, metric) for seed, record in self.records.items()}

    def final(self, metric: str) -> dict[int, float]:
        """By seed, the metric at the end, for the records that have it."""
        return {seed: record.metrics[metric] for seed, record in self.records.items() if metric in record.metrics}

    def mean_over_steps(self, metric: str) -> dict[int, float]:
        """By seed, the metric averaged over a run's evaluations, so that learning earlier counts."""
        found = {seed: list(values.values()) for seed, values in self.by_step(metric).items()}
        return {seed: math.fsum(values) / len(values) for seed, values in found.items() if values}


def _values(record: Record, metric: str) -> dict[int, float]:
    """The metric by evaluation step."""
    return {each.step: each.metrics[metric] for each in record.evaluations if metric in each.metrics}


def collect(cells: Sequence[Cell], records: Sequence[Record]) -> list[CellResult]:
    """The finished records of each cell: those of its settings, with any seed but a search's.

    Its settings are those that its search took, or its recipe's as it stands. A record of the same method and rank with
    others (a try of the search, an override) has another identity and is left out; so is one made with a recipe that
    has changed since.
    """
    near = by_kind(records)
    results = []
    for cell in cells:
        ours = near.get(cell.kind, [])
        taken = settled(cell, ours)
        finished = {record.id: record for record in ours if record.status == "finished"}
        seeds = sorted({record.spec.seed for record in finished.values() if record.spec.seed < FIRST_SEARCH_SEED})
        ids = {seed: taken.spec(seed).id for seed in seeds}
        own = {seed: finished[id_] for seed, id_ in ids.items() if id_ in finished}
        results.append(CellResult(cell, own, searched=taken != cell))
    return results


def by_kind(records: Sequence[Record]) -> dict[tuple[str, int | None, str, str], list[Record]]:
    """Records by what is a cell's `kind`."""
    near: dict[tuple[str, int | None, str, str], list[Record]] = {}
    for record in records:
        spec = record.spec
        near.setdefault((spec.method.name, spec.r, spec.task["name"], spec.scale), []).append(record)
    return near


def winner(rows: Sequence[dict[int, float]], metric: str) -> int | None:
    """The index of the row, of values by seed, that is better than every other; None where there is no such one.

    Each other row is compared by a t-test paired by seed; all comparisons have to hold together at 5 %, by Holm's
    correction. A row that has not run is passed over, and one that shares fewer than two seeds is not told apart.
    """
    sign = 1 if higher_is_better(metric) else -1
    ran = [index for index, values in enumerate(rows) if values]
    if len(ran) < 2:
        return None
    best = max(ran, key=lambda index: sign * math.fsum(rows[index].values()) / len(rows[index]))
    differences = [_paired(rows[best], rows[index]) for index in ran if index != best]
    if any(len(each) < 2 or sign * math.fsum(each) <= 0 for each in differences):
        return None
    return best if max(holm([p_value(each) for each in differences])) <= 1 - CONFIDENCE else None


def p_value(differences: Sequence[float]) -> float:
    """Of a two-sided t-test that paired differences (two or more) have the mean 0; without any spread, 0 or 1."""
    if max(differences) - min(differences) < 1e-9:
        return float(abs(differences[0]) < 1e-9)
    return float(stats.ttest_1samp(differences, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _paired(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Interval | None:
    """ours - theirs over the seeds that both have; None where there are none."""
    differences = _paired(ours, theirs)
    return Interval.of(differences) if differences else None
