"""Table 2: character accuracy by training step, ours beside the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import yaml

from ..results.aggregate import CellResult, Interval, collect, paired_difference
from ..results.records import Record
from ..spec import CONF
from ..spec.table import load_table, ranks

METRIC = "char_accuracy"
BUDGET_TOLERANCE = 0.02  # of LoRA's trainable parameters at the same rank


@dataclass(frozen=True)
class Row:
    """A row with the paper's values for it (None where the paper has none), in the order of the columns."""

    title: str
    result: CellResult
    ours: list[Interval | None]
    paper: list[float]
    off_budget: bool


@dataclass(frozen=True)
class Table2:
    scale: str
    steps: list[int]
    all_steps: int
    paper_steps: list[int]
    rows: list[Row]

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for row in self.rows for seed in row.result.records})

    @property
    def missing(self) -> list[str]:
        """The rows that have not run."""
        return [_name(row) for row in self.rows if not row.result.records]

    def row(self, method: str, r: int | None) -> Row:
        [row] = [row for row in self.rows if (row.result.cell.method, row.result.cell.r) == (method, r)]
        return row

    def best(self, column: int) -> Row | None:
        """The row that leads a column by more than the intervals: nothing else's interval reaches its own."""
        known = [(row.ours[column], row) for row in self.rows]
        with_interval = [(ours, row) for ours, row in known if ours is not None and ours.half is not None]
        if len(with_interval) < 2:
            return None
        (first, winner), (second, _) = sorted(with_interval, key=lambda pair: -pair[0].mean)[:2]
        others = max(ours.high for ours, row in with_interval if row is not winner)
        return winner if first.mean > second.mean and first.low > others else None


def build(scale: str, records: list[Record]) -> Table2:
    """Table 2 at a scale, from the records in which its cells' recipes as they stand were run."""
    table = load_table("2")
    cells = table.cells(scale)
    training = cells[0].spec(0).training
    paper = yaml.safe_load((CONF.parent / "results" / "paper" / "results.yaml").read_text())["table2"]
    to_paper: dict[int | None, int | None] = {None: None}
    for name in ("low", "high"):
        to_paper |= zip(ranks(scale)[name], ranks("paper")[name], strict=True)
    reported = {(row["method"], row["r"]): row["values"] for row in paper["rows"]}
    results = collect(cells, records)
    lora = {result.cell.r: result.trainable for result in results if result.cell.method == "lora"}
    rows = [
        Row(
            title=cell.spec(0).method.title,
            result=result,
            ours=[result.at_step(METRIC, step) for step in training.evaluate_at],
            paper=reported[cell.method, to_paper[cell.r]],
            off_budget=_off_budget(result.trainable, lora.get(cell.r)),
        )
        for cell, result in zip(cells, results, strict=True)
    ]
    return Table2(
        scale=scale,
        steps=list(training.evaluate_at),
        all_steps=training.steps or training.evaluate_at[-1],
        paper_steps=[int(column.removeprefix("step_")) for column in paper["columns"]],
        rows=rows,
    )


def _off_budget(trainable: int | None, lora: int | None) -> bool:
    return bool(trainable and lora) and abs(trainable / lora - 1) > BUDGET_TOLERANCE  # type: ignore[operator]


def _name(row: Row) -> str:
    return row.title if row.result.cell.r is None else f"{row.title} r={row.result.cell.r}"


def shown(interval: Interval | None) -> str:
    """'57.1 ± 3.2', '57.1' for one seed, 'not run'."""
    if interval is None:
        return "not run"
    return f"{interval.mean:.1f}" if interval.half is None else f"{interval.mean:.1f} ± {interval.half:.1f}"


def caption(table: Table2) -> str:
    kind = (
        f"mean and 95 % t-interval over the seeds {', '.join(map(str, table.seeds))}"
        if len(table.seeds) > 1
        else "one seed, so without an interval"
    )
    text = (
        f"Character accuracy (%) of the generated UUID after N training steps: ours at scale {table.scale} "
        f"({table.all_steps} steps; {kind}), and the paper's (LLaMA-2 7B, 1,000 steps, one run per row). "
        f"Bold: its interval is apart from every other row's."
    )
    if table.scale == "mini":
        text += " The scales differ, so it is the order of the rows that can be compared, not the numbers."
    if any(row.off_budget for row in table.rows):
        text += " †: the number of trainable parameters is more than 2 % off LoRA's at the same r."
    if table.missing:
        text += f" Not run: {', '.join(table.missing)}."
    return text


def frame(table: Table2, bold: str) -> pd.DataFrame:
    """The table as it is shown; `bold` is a format such as '**{}**'."""
    rows = []
    for row in table.rows:
        trainable = row.result.trainable
        cells: dict[str, Any] = {
            "method": row.title,
            "r": "-" if row.result.cell.r is None else str(row.result.cell.r),
            "trainable": "-" if trainable is None else f"{trainable:,}{' †' if row.off_budget else ''}",
            "seeds": str(len(row.result.records)),
        }
        for column, (step, ours) in enumerate(zip(table.steps, row.ours, strict=True)):
            text = shown(ours)
            cells[f"step {step}"] = bold.format(text) if table.best(column) is row else text
        for step, value in zip(table.paper_steps, row.paper, strict=True):
            cells[f"paper {step}"] = f"{value:.1f}"
        rows.append(cells)
    return pd.DataFrame(rows)


def markdown(table: Table2) -> str:
    cells = frame(table, "**{}**")
    align = ["left"] + ["right"] * (cells.shape[1] - 1)
    return f"{caption(table)}\n\n{cells.to_markdown(index=False, colalign=align, disable_numparse=True)}\n"


def latex(table: Table2) -> str:
    """A booktabs table (\\usepackage{booktabs})."""
    shown_frame = frame(table, "BOLD{}END").map(_escaped)
    columns = "lr" + "r" * (shown_frame.shape[1] - 2)
    text = shown_frame.to_latex(index=False, column_format=columns, caption=_escaped(caption(table)), label="tab:uuid")
    return text.replace("BOLD", r"\textbf{").replace("END", "}")


def _escaped(text: str) -> str:
    for plain, escaped in (("%", r"\%"), ("±", r"$\pm$"), ("†", r"$\dagger$")):
        text = text.replace(plain, escaped)
    return text


def csv(table: Table2) -> str:
    """Everything in full precision: per row and step the mean and its interval, and the records behind it."""
    rows = []
    for row in table.rows:
        cells: dict[str, Any] = {
            "scale": table.scale,
            "method": row.result.cell.method,
            "r": row.result.cell.r,
            "trainable": row.result.trainable,
            "seeds": len(row.result.records),
        }
        for step, ours in zip(table.steps, row.ours, strict=True):
            cells[f"step_{step}_mean"] = ours.mean if ours else None
            cells[f"step_{step}_low"] = ours.low if ours and ours.half is not None else None
            cells[f"step_{step}_high"] = ours.high if ours and ours.half is not None else None
        for step, value in zip(table.paper_steps, row.paper, strict=True):
            cells[f"paper_step_{step}"] = value
        cells["records"] = " ".join(record.id for record in row.result.records.values())
        rows.append(cells)
    return pd.DataFrame(rows).astype({"r": "Int64", "trainable": "Int64"}).to_csv(index=False)


def sentence(table: Table2) -> str:
    """What the table shows of the paper's claim that MoRA memorises faster than LoRA, in honest words."""
    parts = []
    for name in ("low", "high"):
        [r] = ranks(table.scale)[name]
        lora, mora = table.row("lora", r), table.row("mora", r)
        ours = paired_difference(mora.result.mean_by_seed(METRIC), lora.result.mean_by_seed(METRIC))
        if ours is None:
            parts.append(f"at r={r}, LoRA and MoRA have not both run")
            continue
        paper = sum(mora.paper) / len(mora.paper) - sum(lora.paper) / len(lora.paper)
        way = "above" if ours.mean > 0 else "below"
        text = f"at r={r}, MoRA is {abs(ours.mean):.1f} points {way} LoRA on average over the steps"
        if ours.half is None:
            text += f" (the paper: {paper:+.1f})"
        else:
            verdict = "apart from 0" if ours.low > 0 or ours.high < 0 else "which may be chance"
            interval = f"95 % interval of the difference {ours.low:+.1f} to {ours.high:+.1f}, {verdict}"
            text += f" ({interval}; the paper: {paper:+.1f})"
        parts.append(text)
    text = "; ".join(parts) + "."
    if len(table.seeds) < 2:
        text += (
            f" One seed can't tell an effect from chance: python scripts/sweep.py table=2 scale={table.scale} seeds=3"
        )
    return text[0].upper() + text[1:]
