"""Everything that `scripts/report.py` writes and prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig
from rich.console import Console

from ..disk import write_atomically
from ..errors import UserError
from ..results.aggregate import collect
from ..results.records import Record, Store
from ..spec.compose import options
from ..spec.table import load_table
from . import figures, table2
from .sentence import sentence
from .terminal import grid

FIGURES = ("figure2", "figure3")


def main(config: DictConfig) -> int:
    """`python scripts/report.py`: the tables and figures of `scale`, or of every scale that has records.

    Raises UserError where there is nothing to report, for an unknown scale, and for a folder that can't be written.
    """
    store = Store(config.out)
    records, problems = store.load_all()
    for problem in problems:
        print(problem, file=sys.stderr)
    scales = [scale for scale in ([config.scale] if config.scale else options("scale")) if _has_run(scale, records)]
    if not scales:
        at = f" at scale={config.scale}" if config.scale else ""
        others = f" ({len(records)} other records: searches and overridden runs join no table)" if records else ""
        raise UserError(
            f"out={config.out} has no finished run of Table 2 or its figures{at}{others}. Make them: "
            f"python scripts/sweep.py table=2 scale={config.scale or 'mini'} seeds=3 out={config.out}"
        )
    try:
        for scale in scales:
            report(scale, records, store)
    except OSError as error:
        raise UserError(
            f"out={config.out} can't be written ({error}). Choose a folder that can, and copy runs/ there: out=<folder>"
        ) from error
    return 0


def _has_run(scale: str, records: Sequence[Record]) -> bool:
    cells = [cell for name in ("2", *FIGURES) for cell in load_table(name).cells(scale)]
    return any(result.records for result in collect(cells, records))


def report(scale: str, records: Sequence[Record], store: Store) -> None:
    """Write Table 2 and Figures 2 and 3 of a scale, and print the table, what it shows, and the files."""
    table = table2.build(scale, records)
    tables = store.out / "tables" / f"table2-{scale}"
    for suffix, text in (
        (".md", table2.markdown(table)),
        (".csv", table2.csv(table)),
        (".tex", table2.latex(table)),
    ):
        write_atomically(tables.with_suffix(suffix), text)
    files = [f"table 2:  {tables}.md, .csv, .tex"]
    for name in FIGURES:
        figure, missing = figures.draw(name, scale, records)
        path = store.out / "figures" / f"{name}-{scale}"
        figures.save(figure, path)
        note = f" (not run: {', '.join(missing)})" if missing else ""
        files.append(f"figure {name.removeprefix('figure')}: {path}.png, .pdf{note}")
    console = Console()
    console.print(grid(table, console.width))
    text, *command = sentence(table, str(store.out)).splitlines()
    console.print(f"\n{text}", highlight=False, markup=False)
    for line in [*command, "", *files]:  # none of them wrapped, so that they can be copied
        console.print(line, highlight=False, markup=False, soft_wrap=True)
