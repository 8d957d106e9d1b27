"""Table 2: character accuracy by training step, ours beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import yaml

from ..results.aggregate import CellResult, Interval, collect, leader
from ..results.records import Record
from ..spec import RunSpec
from ..spec.compose import ROOT
from ..spec.table import load_table, ranks

METRIC = "char_accuracy"
BUDGET_TOLERANCE = 0.02  # of LoRA's trainable parameters at the same rank
SEVERAL_BASES = "The runs started from {} different sets of base weights, made on different machines, say."
PAPER = ROOT / "results" / "paper" / "results.yaml"


@dataclass(frozen=True)
class Row:
    """A row: ours by step (None: not run), and the paper's by its steps (None: the paper has no such value)."""

    title: str
    result: CellResult
    ours: list[Interval | None]
    paper: list[float | None]
    off_budget: bool

    @property
    def r(self) -> int | None:
        return self.result.cell.r


@dataclass(frozen=True)
class Table2:
    """Table 2 at one scale; `steps` are those of `ours` in each row, `paper_steps` those of `paper`."""

    scale: str
    model: str
    steps: list[int]
    all_steps: int
    paper_steps: list[int]
    paper_all_steps: int
    rows: list[Row]

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for row in self.rows for seed in row.result.records})

    @property
    def missing(self) -> list[str]:
        """The rows without a finished run."""
        return [row.result.cell.name for row in self.rows if not row.result.records]

    @property
    def bases(self) -> int:
        """How many different base weights its runs started from."""
        records = [record for row in self.rows for record in row.result.records.values()]
        return len({record.data.base_sha256 for record in records if record.data})

    def row(self, method: str, r: int | None) -> Row:
        [row] = [row for row in self.rows if (row.result.cell.method, row.r) == (method, r)]
        return row

    def best(self) -> list[int | None]:
        """For every step, the index of the row that leads by more than the intervals, if one does."""
        return [leader([row.ours[column] for row in self.rows]) for column in range(len(self.steps))]


def build(scale: str, records: Sequence[Record]) -> Table2:
    """Table 2 at a scale, from the records in which its cells' recipes as they stand were run."""
    table = load_table("2")
    cells = table.cells(scale)
    spec = cells[0].spec(0)
    paper = yaml.safe_load(PAPER.read_text())["table2"]
    reported = {(row["method"], row["r"]): row["values"] for row in paper["rows"]}
    unreported = [None] * len(paper["columns"])
    to_paper: dict[int | None, int | None] = {None: None}
    for name in ("low", "high"):
        to_paper |= zip(ranks(scale)[name], ranks("paper")[name], strict=True)
    results = collect(cells, records)
    lora = {result.cell.r: result.trainable for result in results if result.cell.method == "lora"}
    rows = [
        Row(
            title=result.cell.spec(0).method.title,
            result=result,
            ours=[result.at_step(METRIC, step) for step in spec.training.evaluate_at],
            paper=reported.get((result.cell.method, to_paper.get(result.cell.r, result.cell.r)), unreported),
            off_budget=_off_budget(result.trainable, lora.get(result.cell.r)),
        )
        for result in results
    ]
    return Table2(
        scale=scale,
        model=spec.model.title,
        steps=list(spec.training.evaluate_at),
        all_steps=_steps(spec),
        paper_steps=[int(column.removeprefix("step_")) for column in paper["columns"]],
        paper_all_steps=_steps(table.cells("paper")[0].spec(0)),
        rows=rows,
    )


def _off_budget(trainable: int | None, lora: int | None) -> bool:
    return trainable is not None and lora is not None and abs(trainable - lora) > BUDGET_TOLERANCE * lora


def _steps(spec: RunSpec) -> int:
    """All optimizer steps of a run."""
    training = spec.training
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None  # one of the two is there
    return math.ceil(training.epochs * math.ceil(spec.task["pairs"] / training.batch_size))


# ---------------------------------------------------------------------------------------------------
# In full precision


def data(table: Table2) -> pd.DataFrame:
    """The table in full precision: per row and step the mean, its interval and the number of seeds, the
    paper's values, and the ids of the records behind the row. What is not known is NA.
    """
    rows = []
    for row in table.rows:
        values: dict[str, Any] = {
            "scale": table.scale,
            "method": row.result.cell.method,
            "r": row.r,
            "trainable": row.result.trainable,
            "seeds": len(row.result.records),
        }
        for step, ours in zip(table.steps, row.ours, strict=True):
            bounded = ours is not None and ours.n > 1
            values[f"step_{step}_mean"] = ours.mean if ours else None
            values[f"step_{step}_low"] = ours.low if ours and bounded else None
            values[f"step_{step}_high"] = ours.high if ours and bounded else None
            values[f"step_{step}_n"] = ours.n if ours else 0
        for step, value in zip(table.paper_steps, row.paper, strict=True):
            values[f"paper_step_{step}"] = value
        values["records"] = " ".join(record.id for record in row.result.records.values())
        rows.append(values)
    return pd.DataFrame(rows).astype({"r": "Int64", "trainable": "Int64"})


def csv(table: Table2) -> str:
    return data(table).to_csv(index=False)


# ---------------------------------------------------------------------------------------------------
# For the eye


def shown(interval: Interval | None, between: str = " ± ") -> str:
    """'57.1 ± 3.2', '57.1' for one seed, 'not run'."""
    if interval is None:
        return "not run"
    return f"{interval.mean:.1f}" + (f"{between}{interval.half:.1f}" if interval.n > 1 else "")


def shown_paper(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def frame(table: Table2, bold: Callable[[str], str]) -> pd.DataFrame:
    """The table as it is read, its columns in three groups; `bold` marks the leader of a step."""
    groups = ("", f"ours ({table.scale}), step", "paper, step")
    best = table.best()
    rows = []
    for index, row in enumerate(table.rows):
        trainable = row.result.trainable
        cells = {
            (groups[0], "method"): row.title,
            (groups[0], "r"): "-" if row.r is None else str(row.r),
            (groups[0], "trainable"): "-" if trainable is None else f"{trainable:,}{' †' if row.off_budget else ''}",
            (groups[0], "seeds"): str(len(row.result.records)),
        }
        for step, ours, first in zip(table.steps, row.ours, best, strict=True):
            cells[groups[1], str(step)] = bold(shown(ours)) if first == index else shown(ours)
        for step, value in zip(table.paper_steps, row.paper, strict=True):
            cells[groups[2], str(step)] = shown_paper(value)
        rows.append(cells)
    return pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(rows[0]))


def caption(table: Table2) -> str:
    """What is compared with what, what the numbers are, and which are missing."""
    if not table.seeds:
        kind = "no finished run"
    elif len(table.seeds) == 1:
        kind = f"one seed ({table.seeds[0]}), so without intervals"
    else:
        kind = f"mean ± 95 % t-interval over the seeds {', '.join(map(str, table.seeds))}"
    parts = [
        f"The paper's Table 2: character accuracy (%) of the generated UUID by training step. "
        f"Ours: scale {table.scale}, {table.model}, {table.all_steps:,} steps in all; {kind}.",
        f"Paper: LLaMA-2 7B, {table.paper_all_steps:,} steps in all, no intervals given.",
    ]
    if table.scale == "mini":
        low, high = (f"r={ranks('mini')[name][0]} stands for r={ranks('paper')[name][0]}" for name in ("low", "high"))
        parts.append(
            f"The scales differ ({low}, {high}), so the order of the methods can be compared, and not the numbers."
        )
    if len(table.seeds) > 1:
        parts.append("Bold: its interval lies above those of all other rows.")
    if any(row.off_budget for row in table.rows):
        parts.append("†: the number of trainable parameters is more than 2 % off LoRA's at the same r.")
    if table.bases > 1:
        parts.append(SEVERAL_BASES.format(table.bases))
    if table.missing:
        parts.append(f"Not run: {len(table.missing)} of {len(table.rows)} rows ({', '.join(table.missing)}).")
    return " ".join(parts)


def markdown(table: Table2) -> str:
    cells = frame(table, "**{}**".format)
    short = {f"ours ({table.scale}), step": "step ", "paper, step": "paper ", "": ""}
    cells.columns = pd.Index([short[group] + name for group, name in cells.columns])
    align = ["left"] + ["right"] * (cells.shape[1] - 1)
    return f"{caption(table)}\n\n{cells.to_markdown(index=False, colalign=align, disable_numparse=True)}\n"


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "%&$#_{}"}
    | {"±": r"$\pm$", "†": r"$\dagger$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"\\": r"\textbackslash{}"}
)


def latex(table: Table2) -> str:
    """A booktabs table that asks for \\usepackage{booktabs,graphicx}; as wide as the text at most."""
    cells = frame(table, "<b>{}</b>".format).map(lambda text: text.translate(_LATEX))
    cells = cells.replace({"<b>": r"\\textbf{", "</b>": "}"}, regex=True)
    text = cells.to_latex(
        index=False,
        column_format="lr" + "r" * (cells.shape[1] - 2),
        multicolumn_format="c",
        caption=caption(table).translate(_LATEX),
        label=f"tab:uuid-{table.scale}",
        position="t",
    )
    ours = cells.shape[1] - len(table.paper_steps) - len(table.steps) + 1
    rules = (
        rf"\cmidrule(lr){{{ours}-{ours + len(table.steps) - 1}}}"
        rf" \cmidrule(lr){{{ours + len(table.steps)}-{cells.shape[1]}}}"
    )
    head, rest = text.split("\\\\\n", 1)  # the row of groups ends with the first \\
    text = f"{head}\\\\\n{rules}\n{rest}"
    text = text.replace("\\begin{tabular}", "\\centering\n\\resizebox{\\textwidth}{!}{%\n\\begin{tabular}")
    return text.replace("\\end{tabular}", "\\end{tabular}}")
