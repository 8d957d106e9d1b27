"""The paper's tables and figures as lists of cells (conf/table)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import yaml
from pydantic import PositiveInt

from ..errors import UserError, did_you_mean
from .compose import CONF, compose_config, options
from .run_spec import RunSpec, Strict

# Rates are chosen on data of seeds from here on; tables use those below.
FIRST_SEARCH_SEED = 100


@dataclass(frozen=True)
class Cell:
    """One method at one rank on one task at one scale, run with as many seeds as one likes."""

    method: str
    r: int | None
    task: str
    scale: str

    def overrides(self, seed: int) -> list[str]:
        """What `train.py` is called with."""
        rank = [] if self.r is None else [f"r={self.r}"]
        return [f"method={self.method}", f"task={self.task}", *rank, f"scale={self.scale}", f"seed={seed}"]

    def spec(self, seed: int) -> RunSpec:
        """The run of this cell's recipe with a seed. Raises UserError where it can't be composed."""
        return _spec(self, seed)

    @property
    def name(self) -> str:
        """As its runs': 'LoRA r=8', 'FFT'."""
        return self.spec(0).name


@cache
def _spec(cell: Cell, seed: int) -> RunSpec:
    return RunSpec.from_config(compose_config(cell.overrides(seed)))


class Row(Strict):
    """A row names its rank low or high, or all those of the paper's Figure 2; a scale says which they are."""

    method: str
    rank: Literal["low", "high", "all"] | PositiveInt | None = None


class Table(Strict):
    """conf/table/<name>.yaml."""

    name: str
    title: str
    task: str
    rows: tuple[Row, ...]

    def cells(self, scale: str) -> list[Cell]:
        """The table's cells at a scale, in the order of its rows."""
        named = ranks(scale)
        return [
            Cell(row.method, r, self.task, scale)
            for row in self.rows
            for r in (named[row.rank] if isinstance(row.rank, str) else [row.rank])
        ]


@cache
def ranks(scale: str) -> dict[str, list[int]]:
    """The ranks that a scale calls low, high and all. Raises UserError where there is no such scale."""
    if scale not in (known := options("scale")):
        raise UserError(f"scale={scale} is not known.{did_you_mean(scale, known)} Choices: {', '.join(known)}.")
    named = yaml.safe_load((CONF / "scale" / f"{scale}.yaml").read_text())["scale"]["ranks"]
    return {name: value if isinstance(value, list) else [value] for name, value in named.items()}


def load_table(name: str) -> Table:
    """The table or figure of that name. Raises UserError with the known names where there is none."""
    known = options("table")
    if name not in known:
        raise UserError(f"table={name} is not known.{did_you_mean(name, known)} Choices: {', '.join(known)}.")
    return Table.model_validate(yaml.safe_load((CONF / "table" / f"{name}.yaml").read_text()))
