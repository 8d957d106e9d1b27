"""Everything that `scripts/report.py` writes and prints."""

from __future__ import annotations

import sys

from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table as Grid

from ..errors import UserError
from ..results.records import Record, Store, write_atomically
from . import figures, table2


def main(config: DictConfig) -> int:
    """`python scripts/report.py`: tables and figures of every scale that has records."""
    store = Store(config.out)
    records, problems = store.load_all()
    for problem in problems:
        print(problem, file=sys.stderr)
    known = sorted({record.spec.scale for record in records if record.spec.task["name"] == "uuid"})
    scales = [config.scale] if config.scale else known
    if not known or not set(scales) <= set(known):
        raise UserError(
            f"out={config.out} has no records of Table 2{f' at scale={config.scale}' if config.scale else ''}. "
            f"Make them: python scripts/sweep.py table=2 scale={config.scale or 'mini'} seeds=3 out={config.out}"
        )
    try:
        for scale in scales:
            report(scale, records, store)
    except OSError as error:
        raise UserError(f"the tables and figures can't be written: {error}") from error
    return 0


def report(scale: str, records: list[Record], store: Store) -> None:
    """Write Table 2 and Figures 2 and 3 of a scale, and print the table, what it shows, and the files."""
    table = table2.build(scale, records)
    tables = store.out / "tables" / f"table2-{scale}"
    for suffix, text in (
        (".md", table2.markdown(table)),
        (".csv", table2.csv(table)),
        (".tex", table2.latex(table)),
    ):
        write_atomically(tables.with_suffix(suffix), text)
    console = Console()
    console.print(grid(table))
    console.print(table2.sentence(table), highlight=False)
    console.print(f"\ntable:   {tables}.md, .csv, .tex", highlight=False, soft_wrap=True)
    for name in ("figure2", "figure3"):
        figure, missing = figures.draw(name, scale, records)
        path = store.out / "figures" / f"{name}-{scale}"
        figures.save(figure, path)
        note = f" (not run: {', '.join(missing)})" if missing else ""
        console.print(f"{name}: {path}.png, .pdf{note}", highlight=False, soft_wrap=True)


def grid(table: table2.Table2) -> Grid:
    """Table 2 for a terminal of 80 columns: ours by step, then the paper's by step."""
    seeds = f"{len(table.seeds)} seed" + ("s" if len(table.seeds) != 1 else "")
    lines = Grid(
        title=f"Table 2, character accuracy (%) by step: ours ({table.scale}, {seeds}) | the paper's (7B)",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    lines.add_column("")
    lines.add_column("trained", justify="right")
    for step in [*table.steps, *table.paper_steps]:
        lines.add_column(str(step), justify="right", no_wrap=True)
    for row in table.rows:
        r = "" if row.result.cell.r is None else f" r={row.result.cell.r}"
        trainable = "-" if row.result.trainable is None else f"{row.result.trainable:,}"
        ours = ["-" if i is None else f"{i.mean:.1f}" + ("" if i.half is None else f"±{i.half:.0f}") for i in row.ours]
        for column, text in enumerate(ours):
            if table.best(column) is row:
                ours[column] = f"[bold]{text}[/bold]"
        paper = [f"[dim]{value:.1f}[/dim]" for value in row.paper]
        lines.add_row(f"{row.title}{r}", trainable, *ours, *paper)
    return lines
