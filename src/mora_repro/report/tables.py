"""The paper's tables: ours beside the paper's, from records alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
import yaml

from ..results.aggregate import CellResult, Interval, collect, winner
from ..results.records import Record, higher_is_better
from ..spec.compose import ROOT
from ..spec.table import Cell, Column, Row, Table, at, load_table, ranks

DIFFERENCE = "ours less paper's"  # a group of columns
MOST_NAMED = 8  # cells that have not run, or not searched, in a caption
BUDGET_TOLERANCE = 0.02  # of LoRA's trainable parameters at the same rank
PAPER = ROOT / "results" / "paper" / "results.yaml"


@dataclass(frozen=True)
class Entry:
    """A row's value in a column. `result` None: no such cell at this scale; `paper` None: the paper has no value."""

    result: CellResult | None
    metric: str
    step: int | None
    values: dict[int, float]  # by seed
    paper: float | None

    @property
    def ours(self) -> Interval | None:
        return Interval.of(list(self.values.values())) if self.values else None


@dataclass(frozen=True)
class Line:
    """A row: its title, the rank of all its cells (None: it has none, or several), and an entry per column."""

    title: str
    r: int | None
    entries: list[Entry]
    off_budget: bool

    @property
    def results(self) -> list[CellResult]:
        return list({e.result.cell: e.result for e in self.entries if e.result}.values())

    @property
    def trainable(self) -> int | None:
        """The trainable parameters, of the first task that has run; tasks differ by their vocabularies.

        None also where the row has several ranks: the CSV has those of each cell.
        """
        if len({result.cell.r for result in self.results}) > 1:
            return None
        return next((count for result in self.results if (count := result.trainable) is not None), None)

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for result in self.results for seed in result.records})

    @property
    def name(self) -> str:
        return self.title if self.r is None else f"{self.title} r={self.r}"


@dataclass(frozen=True)
class View:
    """A table of conf/table at one scale."""

    table: Table
    scale: str
    columns: tuple[Column, ...]
    titles: list[str]
    lines: list[Line]

    @property
    def name(self) -> str:
        """'Table 2', or what a table that the paper has not is called."""
        return f"Table {self.table.name}" if self.table.name.isdigit() else self.table.name.capitalize()

    @property
    def file(self) -> str:
        return f"{self.name.lower().replace(' ', '')}-{self.scale}"

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for line in self.lines for seed in line.seeds})

    @property
    def has_every_column(self) -> bool:
        """Whether each column has a run."""
        return all(any(line.entries[i].values for line in self.lines) for i in range(len(self.columns)))

    @property
    def has_paper(self) -> bool:
        """Whether the paper has a number for any of it."""
        return any(entry.paper is not None for line in self.lines for entry in line.entries)

    @property
    def missing(self) -> list[str]:
        """The cells without a finished run."""
        results = [result for line in self.lines for result in line.results if not result.records]
        return list(dict.fromkeys(self._called(result) for result in results))

    @property
    def unsearched(self) -> list[str]:
        """The cells that ran at the rates of their recipes beside such that have searched theirs."""
        results = [result for line in self.lines for result in line.results if result.records]
        if not any(result.searched for result in results):
            return []
        return list(dict.fromkeys(self._called(result) for result in results if not result.searched))

    def _called(self, result: CellResult) -> str:
        return f"{result.cell.name} on {result.cell.task}" if self.table.task is None else result.cell.name

    @property
    def cells(self) -> int:
        return len({result.cell for line in self.lines for result in line.results})

    @property
    def bases(self) -> int:
        """The most different base weights that the runs of one column started from."""
        return max(
            len({r.data.base_sha256 for e in column for r in (e.result.records.values() if e.result else []) if r.data})
            for column in zip(*(line.entries for line in self.lines))
        )

    def winners(self) -> list[int | None]:
        """For every column, the index of the line that is better than all others, if one is (`winner`).

        None where some have searched their rates and others have not.
        """
        found: list[int | None] = []
        for column, entries in zip(self.columns, zip(*(line.entries for line in self.lines))):
            alike = len({entry.result.searched for entry in entries if entry.result and entry.values}) == 1
            values = [entry.values for entry in entries]
            found.append(winner(values, at(column.metric, self.scale)) if alike else None)
        return found


def build(name: str, scale: str, records: Sequence[Record]) -> View:
    """A table at a scale, from the records in which its cells' recipes as they stand were run.

    Columns that no cell has at this scale are left out.
    """
    table = load_table(name)
    results = {result.cell: result for result in collect(table.cells(scale), records)}
    columns = [column for column in table.columns if column.is_at(scale)]
    lines = []
    for row in table.rows:
        entries = [_entry(table, row, column, scale, results) for column in columns]
        ours = {e.result.cell.r for e in entries if e.result}
        title = row.title or next(e.result.cell.spec(0).method.title for e in entries if e.result)
        lines.append(Line(title, ours.pop() if len(ours) == 1 else None, entries, False))
    budget = {
        (result.cell.task, result.cell.model, result.cell.r): result.trainable
        for result in results.values()
        if result.cell.method == "lora"
    }
    lines = [
        Line(line.title, line.r, line.entries, any(_off_budget(result, budget) for result in line.results))
        for line in lines
    ]
    titles = [
        at(column.title, scale).format(step=_step(lines, i), r=_rank(lines, i)) for i, column in enumerate(columns)
    ]
    return View(table, scale, tuple(columns), titles, lines)


def _entry(table: Table, row: Row, column: Column, scale: str, results: dict[Cell, CellResult]) -> Entry:
    [cell] = table.cells_of(row, column, scale)
    result, metric = results[cell], at(column.metric, scale)
    steps = cell.spec(0).training.evaluate_at
    step = None
    if column.evaluation >= 0:
        step = steps[column.evaluation]
        values = {seed: by[step] for seed, by in result.by_step(metric).items() if step in by}
    else:
        values = result.final(metric)
    return Entry(result, metric, step, values, _in_paper(table, row, column))


def _in_paper(table: Table, row: Row, column: Column) -> float | None:
    """The paper's value, found by the row's method and rank at scale paper, or by its title."""
    if f"table{table.name}" not in paper_results():
        return None
    reported = paper_results()[f"table{table.name}"]
    if not column.is_at("paper"):
        return None
    [cell] = table.cells_of(row, column, "paper")
    for line in reported["rows"]:
        if line.get("operator", row.title) != row.title or line.get("method", cell.method) != cell.method:
            continue
        if line.get("r", cell.r) == cell.r:
            return dict(zip(reported["columns"], line["values"], strict=True)).get(column.name)
    return None


@cache
def paper_results() -> dict[str, Any]:
    """results/paper/results.yaml."""
    return yaml.safe_load(PAPER.read_text())


def _off_budget(result: CellResult, lora: dict[tuple[str, str | None, int | None], int | None]) -> bool:
    theirs = lora.get((result.cell.task, result.cell.model, result.cell.r))
    ours = result.trainable
    return ours is not None and theirs is not None and abs(ours - theirs) > BUDGET_TOLERANCE * theirs


def _step(lines: Sequence[Line], column: int) -> int | None:
    return next((line.entries[column].step for line in lines), None)


def _rank(lines: Sequence[Line], column: int) -> int | None:
    return next((e.result.cell.r for line in lines if (e := line.entries[column]).result), None)


# ---------------------------------------------------------------------------------------------------
# In full precision


def data(view: View) -> pd.DataFrame:
    """A row per cell and column in full precision: mean, interval and number of seeds, the paper's value, the
    difference from it, and the ids of the records behind it. What is not known is NA.
    """
    rows = []
    for line in view.lines:
        for column, entry in zip(view.columns, line.entries, strict=True):
            if entry.result is None:
                continue
            ours = entry.ours
            bounded = ours is not None and ours.n > 1
            rows.append(
                {
                    "table": view.table.name,
                    "scale": view.scale,
                    "row": line.title,
                    "column": column.name,
                    "method": entry.result.cell.method,
                    "r": entry.result.cell.r,
                    "task": entry.result.cell.task,
                    "metric": entry.metric,
                    "step": entry.step,
                    "trainable": entry.result.trainable,
                    "mean": ours.mean if ours else None,
                    "low": ours.low if ours and bounded else None,
                    "high": ours.high if ours and bounded else None,
                    "n": ours.n if ours else 0,
                    "paper": entry.paper,
                    "difference": ours.mean - entry.paper if ours and entry.paper is not None else None,
                    "records": " ".join(entry.result.records[seed].id for seed in sorted(entry.values)),
                }
            )
    return pd.DataFrame(rows).astype({"r": "Int64", "step": "Int64", "trainable": "Int64"})


def csv(view: View) -> str:
    return data(view).to_csv(index=False)


# ---------------------------------------------------------------------------------------------------
# For the eye


def shown(entry: Entry, between: str = " ± ") -> str:
    """'57.1 ± 3.2', '57.1' for one seed, 'not run'."""
    ours = entry.ours
    if ours is None:
        return "not run"
    return f"{ours.mean:.1f}" + (f"{between}{ours.half:.1f}" if ours.n > 1 else "")


def shown_paper(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def shown_difference(entry: Entry) -> str:
    return f"{entry.ours.mean - entry.paper:+.1f}" if entry.ours and entry.paper is not None else "-"


def frame(view: View, bold: Callable[[str], str]) -> pd.DataFrame:
    """The table as it is read, its columns in groups; `bold` marks a column's winner."""
    groups = ("", f"ours ({view.scale})", "paper", DIFFERENCE)
    paper = view.columns if view.has_paper else ()
    differences = paper if view.scale == "paper" else ()  # elsewhere the numbers can't be compared
    winners = view.winners()
    rows = []
    for index, line in enumerate(view.lines):
        cells = {(groups[0], "method" if view.table.method is None else "operator"): line.title}
        if any(each.r is not None for each in view.lines):
            cells[groups[0], "r"] = "-" if line.r is None else str(line.r)
        trainable = "-" if line.trainable is None else f"{line.trainable:,}"
        cells[groups[0], "trainable"] = f"{trainable} †" if line.off_budget else trainable
        cells[groups[0], "seeds"] = str(len(line.seeds))
        for title, entry, first in zip(view.titles, line.entries, winners, strict=True):
            cells[groups[1], title] = bold(shown(entry)) if first == index else shown(entry)
        for column, entry in zip(paper, line.entries):
            cells[groups[2], paper_title(column)] = shown_paper(entry.paper)
        for column, entry in zip(differences, line.entries):
            cells[groups[3], paper_title(column)] = shown_difference(entry)
        rows.append(cells)
    return pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(rows[0]))


def paper_title(column: Column) -> str:
    """The paper's column: '300', 'mmlu 0shot', '250M'."""
    return re.sub(r"^(step|r)_?(?=\d)", "", column.name).replace("_", " ")


def caption(view: View) -> str:
    """What is compared with what, what the numbers are, and which are missing."""
    if not view.seeds:
        kind = "no finished run"
    elif len(view.seeds) == 1:
        kind = f"one seed ({view.seeds[0]}), so without intervals"
    else:
        kind = f"mean ± 95 % t-interval over the seeds {', '.join(map(str, view.seeds))}"
    models = dict.fromkeys(r.cell.spec(0).model.title for line in view.lines for r in line.results)
    ours = f"Ours: scale {view.scale}, {', '.join(models)}; {kind}."
    whose = "The paper's " if view.table.name.isdigit() else ""
    parts = [f"{whose}{view.name}: {view.table.title}. {ours}"]
    if view.scale == "mini":
        low, high = (f"r={ranks('mini')[name][0]} stands for r={ranks('paper')[name][0]}" for name in ("low", "high"))
        parts.append(
            f"The scales differ ({low}, {high}; generated data), so the order of the methods can be compared, and not "
            f"the numbers."
        )
    lower = [higher_is_better(at(column.metric, view.scale)) for column in view.columns].count(False)
    if lower:
        parts.append("Lower is better." if lower == len(view.columns) else "Of perplexity, lower is better.")
    if len(view.seeds) > 1:
        alike = ", of rows that have all searched their rates or none" if view.unsearched else ""
        parts.append(
            f"Bold: better than every other row (t-tests paired by seed, at 5 % after Holm's correction){alike}."
        )
    if any(line.off_budget for line in view.lines):
        parts.append("†: the number of trainable parameters is more than 2 % off LoRA's at the same r.")
    if view.bases > 1:
        parts.append(SEVERAL_BASES.format(view.bases))
    if view.unsearched:
        parts.append(f"{UNSEARCHED}: {_some(view.unsearched, view)}.")
    if view.missing:
        parts.append(f"Not run: {_some(view.missing, view)}.")
    return " ".join(parts)


def _some(names: Sequence[str], view: View) -> str:
    shown = f" ({', '.join(names)})" if len(names) <= MOST_NAMED else ""
    return f"{len(names)} of {view.cells} cells{shown}"


UNSEARCHED = "At the rates of their recipes, where others have searched theirs"
SEVERAL_BASES = "The runs started from {} different sets of base weights, made on different machines, say."


def markdown(view: View) -> str:
    cells = frame(view, "**{}**".format)
    ours, paper = f"ours ({view.scale})", "paper"
    short = {ours: "", paper: "paper: ", DIFFERENCE: "difference: ", "": ""}
    cells.columns = pd.Index([short[group] + name for group, name in cells.columns])
    align = ["left"] + ["right"] * (cells.shape[1] - 1)
    return f"{caption(view)}\n\n{cells.to_markdown(index=False, colalign=align, disable_numparse=True)}\n"


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "%&$#_{}"}
    | {"±": r"$\pm$", "†": r"$\dagger$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"\\": r"\textbackslash{}"}
)


def latex(view: View) -> str:
    """A booktabs table that asks for \\usepackage{booktabs,graphicx}; as wide as the text at most."""
    cells = frame(view, "<b>{}</b>".format).map(lambda text: text.translate(_LATEX))
    cells = cells.replace({"<b>": r"\\textbf{", "</b>": "}"}, regex=True)
    groups = [str(group) for group, _ in cells.columns]
    named = [group for group in dict.fromkeys(groups) if group]
    spans = [(groups.index(group) + 1, len(groups) - groups[::-1].index(group)) for group in named]
    text = cells.to_latex(
        index=False,
        column_format="l" + "r" * (cells.shape[1] - 1),
        multicolumn_format="c",
        caption=caption(view).translate(_LATEX),
        label=f"tab:{view.file}",
        position="t",
    )
    rules = " ".join(rf"\cmidrule(lr){{{first}-{last}}}" for first, last in spans)
    head, rest = text.split("\\\\\n", 1)  # the row of groups ends with the first \\
    text = f"{head}\\\\\n{rules}\n{rest}"
    text = text.replace("\\begin{tabular}", "\\centering\n\\resizebox{\\textwidth}{!}{%\n\\begin{tabular}")
    return text.replace("\\end{tabular}", "\\end{tabular}}")
