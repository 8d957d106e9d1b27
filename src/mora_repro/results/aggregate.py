"""From records to the rows of a table: which records belong to a cell, and their mean and interval."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import stats

from ..spec.table import Cell
from .records import Record

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values with its 95 % t-interval; `half` is None for a single value."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Interval:
        """Raises ValueError for no values."""
        n = len(values)
        if n == 0:
            raise ValueError("an interval needs at least one value")
        mean = sum(values) / n
        if n == 1:
            return cls(mean, None, n)
        half = stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
        return cls(mean, float(half), n)

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


@dataclass(frozen=True)
class CellResult:
    """A cell with its finished records, by seed; none where it has not run."""

    cell: Cell
    records: dict[int, Record]

    @property
    def trainable(self) -> int | None:
        for record in self.records.values():
            if record.parameters:
                return record.parameters.trainable
        return None

    def at_step(self, metric: str, step: int) -> Interval | None:
        """The metric at an evaluation step over the seeds; None where no record has it."""
        values = [
            evaluation.metrics[metric]
            for record in self.records.values()
            for evaluation in record.evaluations
            if evaluation.step == step and metric in evaluation.metrics
        ]
        return Interval.of(values) if values else None

    def mean_by_seed(self, metric: str) -> dict[int, float]:
        """For every seed, the metric averaged over the run's evaluations: higher is learnt earlier."""
        return {
            seed: sum(evaluation.metrics[metric] for evaluation in record.evaluations) / len(record.evaluations)
            for seed, record in self.records.items()
        }


def collect(cells: list[Cell], records: list[Record]) -> list[CellResult]:
    """The finished records of each cell: those of its recipe as it stands, with any seed but the search's.

    A record of the same method and rank with other settings (a try of the rate search, an override) has
    another identity and is left out; so is one made with a recipe that has changed since.
    """
    finished = {record.id: record for record in records if record.status == "finished"}
    results = []
    for cell in cells:
        seeds = {
            record.spec.seed
            for record in finished.values()
            if (record.spec.method.name, record.spec.r, record.spec.scale) == (cell.method, cell.r, cell.scale)
            and record.spec.task["name"] == cell.task
        }
        ids = {seed: cell.spec(seed).id for seed in sorted(seeds - {SEARCH_SEED})}
        results.append(CellResult(cell, {seed: finished[id_] for seed, id_ in ids.items() if id_ in finished}))
    return results


SEARCH_SEED = 100  # rates are chosen on its pairs; no table uses them


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Interval | None:
    """ours - theirs over the seeds that both have; None where there are none."""
    both = sorted(ours.keys() & theirs.keys())
    return Interval.of([ours[seed] - theirs[seed] for seed in both]) if both else None
