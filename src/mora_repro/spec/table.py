"""The paper's tables and figures as lists of cells (conf/table)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError

from ..errors import UserError, did_you_mean
from .compose import CONF, options
from .remembered import spec_of
from .run_spec import RunSpec, Strict, briefly

# Rates are chosen on data of seeds from here on; tables use those below.
FIRST_SEARCH_SEED = 100

Setting = tuple[tuple[str, float], ...]  # (key, value) of lr and what else is searched


@dataclass(frozen=True)
class Cell:
    """One method at one rank on one task at one scale, run with as many seeds as one likes.

    `model` None: the task's own. `extra` are further overrides of conf/config.yaml, such as another operator, and
    `settings` what a search found, in place of the recipe's.
    """

    method: str
    r: int | None
    task: str
    scale: str
    model: str | None = None
    extra: tuple[str, ...] = ()
    settings: Setting = ()

    def overrides(self, seed: int) -> list[str]:
        """What `train.py` is called with."""
        rank = [] if self.r is None else [f"r={self.r}"]
        model = [] if self.model is None else [f"model={self.model}"]
        keys = [f"method={self.method}", f"task={self.task}", *rank, f"scale={self.scale}", *model]
        return [*keys, *self.extra, *(f"{key}={value:g}" for key, value in self.settings), f"seed={seed}"]

    def spec(self, seed: int) -> RunSpec:
        """The run of this cell with a seed. Raises UserError where it can't be composed."""
        return _spec(replace(self, settings=())).with_seed(seed).with_settings(dict(self.settings))

    def with_settings(self, settings: Setting) -> Cell:
        return replace(self, settings=settings)

    def tried(self, settings: Setting) -> tuple[list[str], RunSpec]:
        """A try of the search: the overrides of `train.py`, and the spec that they compose to.

        It is scored on data of a seed that no table uses and, where they are not generated from it, on the validation
        set.
        """
        cell = self.with_settings(settings)
        spec, overrides = cell.spec(FIRST_SEARCH_SEED), cell.overrides(FIRST_SEARCH_SEED)
        if spec.task.get("data", "generated") == "generated":
            return overrides, spec
        validation = spec.eval.model_copy(update={"split": "validation"})
        return [*overrides, "eval.split=validation"], spec.model_copy(update={"eval": validation})

    @property
    def kind(self) -> tuple[str, int | None, str, str]:
        """Method, rank, task and scale, which its records and its tries have in common."""
        return self.method, self.r, self.task, self.scale

    @property
    def recipe(self) -> str:
        """The method whose rows of a recipe it takes."""
        return _spec(replace(self, settings=())).method.recipe

    @property
    def name(self) -> str:
        """As its runs': 'LoRA r=8', 'FFT'; with its further overrides."""
        return " ".join([self.spec(0).name, *self.extra])


@cache
def _spec(cell: Cell) -> RunSpec:
    """A cell's run with seed 0; other seeds and settings follow from it without composing, which takes long."""
    return spec_of(cell.overrides(0))


Rank = Literal["low", "high", "all", "none"] | PositiveInt


class Part(Strict):
    """What a table, a row or a column fixes of its cells; a dict has a value per scale.

    A rank is named low or high, or all those of the paper's Figure 2, and a scale says which they are; `none` takes
    back that of the table, for a method without one.
    """

    method: str | None = None
    rank: Rank | dict[str, Rank] | None = None
    task: str | None = None
    model: dict[str, str] | None = None
    overrides: tuple[str, ...] = ()


class Row(Part):
    """`title` None: the method's."""

    title: str | None = None


class Column(Part):
    """A metric of a cell's runs, at its last evaluation or that of index `evaluation`; at a scale that its metric or
    model does not name, there is no such column.

    `name` is that of the paper's column (results/paper/results.yaml). A title may hold {step} and {r}.
    """

    name: str
    title: str | dict[str, str]
    metric: str | dict[str, str]
    evaluation: int = -1

    def is_at(self, scale: str) -> bool:
        return all(not isinstance(value, dict) or scale in value for value in (self.metric, self.model))


class Table(Part):
    """conf/table/<name>.yaml. A figure has no columns: each of its rows is a curve.

    `paper`: it is one of the paper's.
    """

    name: str
    paper: bool = True
    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...] = ()

    def cells(self, scale: str) -> list[Cell]:
        """The table's different cells at a scale, in the order of its rows."""
        columns: list[Part] = [column for column in self.columns if column.is_at(scale)]
        parts = [(row, column) for row in self.rows for column in columns or [Part()]]
        return list(dict.fromkeys(cell for row, column in parts for cell in self.cells_of(row, column, scale)))

    def cells_of(self, row: Row, column: Part, scale: str) -> list[Cell]:
        """The cell of a row in a column; several where its rank is `all`."""
        return cells_in(scale, row, column, self)


def cells_in(scale: str, *parts: Part) -> list[Cell]:
    """The cell that parts fix together, an earlier part over a later one; several where its rank is `all`."""
    method, task, model, rank = (_fixed(field, *parts) for field in ("method", "task", "model", "rank"))
    named = at(rank, scale)
    extra = tuple(override for part in reversed(parts) for override in part.overrides)
    of_name: dict[str, list[Any]] = {**ranks(scale), "none": [None]}
    ranked = of_name[named] if isinstance(named, str) else [named]
    return [Cell(method, r, task, scale, at(model, scale), extra) for r in ranked]


def _fixed(field: str, *parts: Part) -> Any:
    """The first part's value that is given."""
    return next((value for part in parts if (value := getattr(part, field)) is not None), None)


def at(value: Any, scale: str) -> Any:
    """A value that may be given per scale."""
    return value[scale] if isinstance(value, dict) else value


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


def read_table(path: Path) -> Table:
    """A user's own table, in the form of those in conf/table. Raises UserError: no such file, or not of that form."""
    try:
        return Table.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise UserError(f"cells={path} can't be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise UserError(f"cells={path} is no YAML: {error}") from error
    except ValidationError as error:
        raise UserError(
            f"cells={path} is no table ({briefly(error)}). An example: {CONF / 'table' / '1.yaml'}"
        ) from error


class Selection(Strict):
    """Which runs: the keys that conf/scripts/sweep.yaml and plan.yaml share.

    The seeds of tables and that of searches are kept apart.
    """

    table: str | int | tuple[str | int, ...] | None
    cells: str | None
    scale: str
    seeds: int = Field(ge=0, le=FIRST_SEARCH_SEED)
    search: bool

    @property
    def tables(self) -> list[str]:
        if self.table is None:
            return []
        names = [str(name) for name in (self.table if isinstance(self.table, tuple) else (self.table,))]
        if names in (["all"], ["paper"]):
            return [name for name in options("table") if names == ["all"] or load_table(name).paper]
        return names

    def all_cells(self) -> list[Cell]:
        """The different cells of the tables and of the user's own file. Raises UserError where there are none."""
        if self.table is None and self.cells is None:
            raise UserError(
                f"which runs? table=<name>, of {', '.join(options('table'))}, paper (its own) or all, or "
                f"cells=<file> in their form"
            )
        tables = [load_table(name) for name in self.tables]
        tables += [read_table(Path(self.cells))] if self.cells else []
        return list(dict.fromkeys(cell for each in tables for cell in each.cells(self.scale)))
