"""The search for a cell's rate: which settings it tries, and which of them it takes, from records alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import pandas as pd

from ..spec.compose import find_row, recipe_value, rows_of
from ..spec.table import FIRST_SEARCH_SEED, Cell, Setting
from .records import Record, higher_is_better

STEP = 2.0  # between the rates of a grid that is made wider


@dataclass(frozen=True)
class Search:
    """A cell's tries as far as they are known: those of its grid, then `rounds` further ones around the best.

    `scores` has those that have been made: the task's metric, averaged over the run's evaluations so that learning
    earlier counts, and turned so that higher is better; -inf where the loss diverged.
    """

    cell: Cell
    tries: list[Setting]
    scores: dict[Setting, float]
    records: dict[Setting, Record]
    rounds_left: int

    @property
    def missing(self) -> list[Setting]:
        return [setting for setting in self.tries if setting not in self.scores]

    @property
    def finished(self) -> bool:
        return not self.missing and self.rounds_left == 0

    @property
    def best(self) -> Setting | None:
        """The setting with the highest score, and of equals that with the lowest rate; None before any has one."""
        made = [setting for setting in self.tries if self.scores.get(setting, -math.inf) > -math.inf]
        return max(made, key=lambda setting: (self.scores[setting], -dict(setting)["lr"]), default=None)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest of those tried beside its other settings."""
        rates = _rates_beside(self.tries, self.best) if self.best else []
        return bool(rates) and dict(self.best or ())["lr"] in (rates[0], rates[-1])


def search(cell: Cell, records: Sequence[Record]) -> Search:
    """The search of a cell, from the records of its method, rank, task and scale."""
    made = {_setting(cell, record): record for record in records if _is_try(cell, record)}
    scores = {setting: _score(record) for setting, record in made.items()}
    tries = [*grid(cell)]
    rounds = rounds_of(cell)
    while rounds and all(setting in scores for setting in tries):
        following = _next(tries, scores)
        if following is None:
            rounds = 0
            break
        tries.append(following)
        rounds -= 1
    known = {setting: scores[setting] for setting in tries if setting in scores}
    return Search(cell, tries, known, {setting: made[setting] for setting in known}, rounds)


def settled(cell: Cell, records: Sequence[Record]) -> Cell:
    """The cell with the settings that its search took; as it is, with those of its recipe, where none has finished."""
    found = search(cell, records)
    if not found.finished or found.best is None:
        return cell
    return cell.with_settings(found.best)


def rounds_of(cell: Cell) -> int:
    """How many further settings a cell tries, around the best of its grid."""
    return int(recipe_value(cell.scale, cell.task, cell.recipe, cell.r, "search_rounds"))


@cache
def grid(cell: Cell) -> tuple[Setting, ...]:
    """The settings that a cell tries at first: as many as every other method on its task.

    They are the product of the lists under `search` in its recipe's row; where that is smaller than another row's, the
    rates go on below and above, by factors of STEP.
    """
    row = find_row(cell.scale, cell.task, cell.recipe, cell.r)
    own = row.get("search", {"lr": [row["lr"]]})
    size = max(_size(other.get("search", {})) for other in rows_of(cell.scale, cell.task))
    rates, others = list(own["lr"]), {key: values for key, values in own.items() if key != "lr"}
    while len(rates) * _size(others) < size:
        rates = [min(rates) / STEP, *rates] if len(rates) % 2 else [*rates, max(rates) * STEP]
    keys = ["lr", *others]
    return tuple(tuple(zip(keys, values, strict=True)) for values in itertools.product(rates, *others.values()))


def _size(search: Mapping[str, list[float]]) -> int:
    return math.prod(len(values) for values in search.values())


def _next(tries: Sequence[Setting], scores: Mapping[Setting, float]) -> Setting | None:
    """The next rate to try: beyond the best where that is the lowest or highest, else towards its better neighbour."""
    made = [setting for setting in tries if scores[setting] > -math.inf]
    if not made:
        return None
    best = max(made, key=lambda setting: (scores[setting], -dict(setting)["lr"]))
    rates = _rates_beside(tries, best)
    rate = dict(best)["lr"]
    place = rates.index(rate)
    if place == 0:
        following = rate / STEP
    elif place == len(rates) - 1:
        following = rate * STEP
    else:
        sides = [_with_rate(best, rates[place + step]) for step in (-1, 1)]
        better = max(sides, key=lambda setting: scores[setting])
        following = math.sqrt(rate * dict(better)["lr"])
    return _with_rate(best, float(f"{following:.3g}"))


def _rates_beside(tries: Sequence[Setting], setting: Setting) -> list[float]:
    """The rates tried with the other settings of `setting`, in their order."""
    return sorted(dict(other)["lr"] for other in tries if other[1:] == setting[1:])


def _with_rate(setting: Setting, rate: float) -> Setting:
    return (("lr", rate), *setting[1:])


def _is_try(cell: Cell, record: Record) -> bool:
    """Whether it is a run of the cell with the search's seed, whatever the values that are searched."""
    spec = record.spec
    if spec.seed != FIRST_SEARCH_SEED or record.status not in ("finished", "diverged"):
        return False
    _, wanted = cell.tried(())
    return spec.with_settings({key: wanted.setting(key) for key in _keys(cell)}).id == wanted.id


def _setting(cell: Cell, record: Record) -> Setting:
    return tuple((key, record.spec.setting(key)) for key in _keys(cell))


def _keys(cell: Cell) -> list[str]:
    """The keys that a cell's search tries values of."""
    return [key for key, _ in grid(cell)[0]]


def _score(record: Record) -> float:
    if record.status == "diverged":
        return -math.inf
    metric = record.spec.task["metric"]
    values = [evaluation.metrics[metric] for evaluation in record.evaluations]
    mean = math.fsum(values) / len(values)
    return mean if higher_is_better(metric) else -mean


def table(searches: Sequence[Search]) -> pd.DataFrame:
    """A row per try that has been made, in full; `best` is the one taken, `edge` one at an end of its rates."""
    rows = []
    for found in searches:
        for setting, record in found.records.items():
            metric = record.spec.task["metric"]
            rows.append(
                {
                    "task": found.cell.task,
                    "method": found.cell.method,
                    "r": found.cell.r,
                    "lr": record.spec.lr,
                    **{key.rpartition(".")[2]: value for key, value in setting[1:]},
                    "metric": metric,
                    "score": abs(found.scores[setting]),
                    **{f"step_{each.step}": each.metrics[metric] for each in record.evaluations},
                    "best": found.finished and setting == found.best,
                    "edge": found.finished and setting == found.best and found.at_edge,
                    "record": record.id,
                }
            )
    return pd.DataFrame(rows).astype({"r": "Int64"})
