"""Table 2 in a terminal of 80 columns or more."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table as Grid

from .table2 import SEVERAL_BASES, Table2, shown, shown_paper

ROOMY = 104  # columns from which an interval has place beside its mean, else it goes below


def grid(table: Table2, width: int) -> Grid:
    """Ours by step, then the paper's, for a terminal `width` columns wide."""
    between = " ±" if width >= ROOMY else "\n±"
    best = table.best()
    lines = Grid(
        title=f"Table 2: character accuracy (%) by training step, scale {table.scale}",
        caption=_notes(table),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    lines.add_column("\nmethod")  # the one that is wrapped where the terminal is too narrow
    for name in ("trained\nparams", "\nseeds"):
        lines.add_column(name, justify="right", no_wrap=True)
    for group, steps in (("ours", table.steps), ("paper", table.paper_steps)):
        lines.add_column("", no_wrap=True)  # a gap between the groups
        for index, step in enumerate(steps):
            lines.add_column(f"{group if index == 0 else ''}\n{step}", justify="right", no_wrap=True)
    for index, row in enumerate(table.rows):
        ours = [shown(interval, between) if interval else "-" for interval in row.ours]
        ours = [f"[bold]{text}[/bold]" if first == index else text for text, first in zip(ours, best, strict=True)]
        lines.add_row(
            escape(row.result.cell.name),
            _short(row.result.trainable) + ("†" if row.off_budget else ""),
            str(len(row.result.records)) if row.result.records else "not run",
            "",
            *ours,
            "",
            *(f"[dim]{shown_paper(value)}[/dim]" for value in row.paper),
        )
    return lines


def _notes(table: Table2) -> str:
    notes = [f"ours: {table.model}, {table.all_steps:,} steps; paper: LLaMA-2 7B, {table.paper_all_steps:,} steps"]
    if table.scale == "mini":
        notes.append("the scales differ: compare the order of the methods, not the numbers")
    if len(table.seeds) > 1:
        notes.append("±: 95 % t-interval over seeds; bold: its interval lies above all others")
    if any(row.off_budget for row in table.rows):
        notes.append("†: trainable parameters more than 2 % off LoRA's at the same r")
    if table.bases > 1:
        notes.append(SEVERAL_BASES.format(table.bases))
    if table.missing:
        notes.append(f"not run: {len(table.missing)} of {len(table.rows)} rows")
    return "\n".join(notes)


def _short(count: int | None) -> str:
    """A count in four figures at most: 33.7k, 662k, 6.74B."""
    if count is None:
        return "-"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size * 0.9995:
            return f"{count / size:.3g}{unit}"
    return str(count)
