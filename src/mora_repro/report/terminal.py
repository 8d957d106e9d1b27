"""A table in a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table as Grid

from .tables import SEVERAL_BASES, UNSEARCHED, View, paper_title, shown, shown_paper
from .verdicts import Verdict

ROOMY = (
    9  # columns of the terminal for each value, from which an interval has place beside its mean, else it goes below
)


def grid(view: View, width: int) -> Grid:
    """Ours, then the paper's if it has any, for a terminal `width` columns wide."""
    groups = [("ours", view.titles)]
    if view.has_paper:
        groups.append(("paper", [paper_title(column) for column in view.columns]))
    between = " ±" if width >= 34 + ROOMY * len(groups) * len(view.columns) else "\n±"
    winners = view.winners()
    lines = Grid(
        title=f"{view.name}: {view.table.title}, scale {view.scale}",
        caption=_notes(view),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    lines.add_column("\nmethod")  # the one that is wrapped where the terminal is too narrow
    for name in ("trained\nparams", "\nseeds"):
        lines.add_column(name, justify="right", no_wrap=True)
    for group, titles in groups:
        lines.add_column("", no_wrap=True)  # a gap between the groups
        for index, title in enumerate(titles):
            lines.add_column(f"{group if index == 0 else ''}\n{title}", justify="right", no_wrap=True)
    for index, line in enumerate(view.lines):
        ours = [shown(entry, between) if entry.values else "-" for entry in line.entries]
        ours = [f"[bold]{text}[/bold]" if first == index else text for text, first in zip(ours, winners, strict=True)]
        lines.add_row(
            escape(line.name),
            short(line.trainable) + ("†" if line.off_budget else ""),
            str(len(line.seeds)) if line.seeds else "not run",
            "",
            *ours,
            *(["", *(f"[dim]{shown_paper(entry.paper)}[/dim]" for entry in line.entries)] if view.has_paper else []),
        )
    return lines


def _notes(view: View) -> str:
    notes = []
    if view.scale == "mini" and view.has_paper:
        notes.append("the scales differ: compare the order of the methods, not the numbers")
    if len(view.seeds) > 1:
        notes.append("±: 95 % t-interval over seeds; bold: better than all others (paired, Holm, 5 %)")
    if any(line.off_budget for line in view.lines):
        notes.append("†: trainable parameters more than 2 % off LoRA's at the same r")
    if view.bases > 1:
        notes.append(SEVERAL_BASES.format(view.bases))
    if view.unsearched:
        notes.append(f"{UNSEARCHED.lower()}: {len(view.unsearched)} of {view.cells} cells")
    if view.missing:
        notes.append(f"not run: {len(view.missing)} of {view.cells} cells")
    return "\n".join(notes)


COLOURS = {"holds": "green", "does not hold": "red", "cannot tell": "yellow", "not run": "dim"}


def said(found: Sequence[Verdict]) -> Grid:
    """The claims with their verdicts; those that have not run are counted below."""
    lines = Grid(title="The paper's claims", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=False)
    lines.add_column(ratio=5)
    lines.add_column(no_wrap=True)
    lines.add_column(ratio=6)
    for each in found:
        if each.word != "not run":
            colour = COLOURS[each.word]
            lines.add_row(escape(each.claim.claim), f"[{colour}]{each.word}[/{colour}]", escape(each.reason))
    if left := sum(each.word == "not run" for each in found):
        lines.caption = f"{left} of {len(found)} claims have no runs yet"
    return lines


def short(count: float | None) -> str:
    """A count in four figures at most: 33.7k, 662k, 6.74B."""
    if count is None:
        return "-"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size * 0.9995:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
