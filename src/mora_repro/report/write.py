"""Everything that `scripts/report.py` writes and prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from rich.console import Console

from ..disk import write_atomically
from ..errors import UserError
from ..results.records import Record, Store
from ..spec.compose import options
from ..spec.run_spec import Strict, script_config
from . import figures, html, peers, readme, recipes, tables, verdicts
from .terminal import grid, said

TABLES = ("1", "2", "3", "4", "6", "7", "tasks", "operators", "magnitude")


class Wanted(Strict):
    """conf/scripts/report.yaml, validated."""

    out: str
    scale: str | None
    peers: str | None
    readme: str | None


def main(config: DictConfig) -> int:
    """`python scripts/report.py`: the tables and figures of `scale`, or of every scale that has records.

    Raises UserError where there is nothing to report, for an unknown scale, and for a folder that can't be written.
    """
    wanted = script_config(Wanted, config, "report")
    store = Store(wanted.out)
    records, problems = store.load_all()
    for problem in problems:
        print(problem, file=sys.stderr)
    ran = {record.spec.scale for record in records}
    views = {
        scale: [view for name in TABLES if (view := tables.build(name, scale, records)).seeds]
        for scale in ([wanted.scale] if wanted.scale else options("scale"))
        if scale in ran or wanted.scale  # composing its cells takes seconds
    }
    if not any(views.values()):
        at = f" at scale={wanted.scale}" if wanted.scale else ""
        left_out = f" ({len(records)} other records: searches and overridden runs join no table)" if records else ""
        raise UserError(
            f"out={wanted.out} has no finished run of a table{at}{left_out}. Make them: "
            f"python scripts/sweep.py table=2 scale={wanted.scale or 'mini'} seeds=3 out={wanted.out}"
        )
    others: pd.DataFrame | None = None
    if wanted.peers:
        others, unread = peers.read(Path(wanted.peers))
        for problem in unread:
            print(problem, file=sys.stderr)
    try:
        views = {scale: some for scale, some in views.items() if some}
        found = {scale: verdicts.verdicts(scale, records) for scale in views}
        for scale, some in views.items():
            report(scale, some, found[scale], records, store)
        page = store.out / "report.html"
        write_atomically(page, html.page(views, found, records, others))
        if others is not None:
            path = store.out / "tables" / "peers"
            write_atomically(path.with_suffix(".md"), peers.markdown(others))
            write_atomically(path.with_suffix(".csv"), others.to_csv(index=False))
            print(f"peers:    {path}.md, .csv")
    except OSError as error:
        raise UserError(
            f"out={wanted.out} can't be written ({error}). Choose a folder that can, and copy runs/ there: out=<folder>"
        ) from error
    if wanted.readme:
        fill_readme(Path(wanted.readme))
    print(f"report:   {page}")
    return 0


def report(
    scale: str,
    views: Sequence[tables.View],
    found: Sequence[verdicts.Verdict],
    records: Sequence[Record],
    store: Store,
) -> None:
    """Write the tables, figures and verdicts of a scale, and print them."""
    console = Console()
    files = []
    for view in views:
        path = store.out / "tables" / view.file
        write_atomically(path.with_suffix(".md"), tables.markdown(view))
        write_atomically(path.with_suffix(".csv"), tables.csv(view))
        write_atomically(path.with_suffix(".tex"), tables.latex(view))
        if view.has_every_column:
            console.print(grid(view, console.width))
        files.append(f"{view.name.lower() + ':':<9} {path}.md, .csv, .tex")
    path = store.out / "tables" / f"table5-{scale}"
    write_atomically(path.with_suffix(".md"), recipes.markdown(views, scale))
    write_atomically(path.with_suffix(".csv"), recipes.used(views).to_csv(index=False))
    files.append(f"table 5:  {path}.md, .csv")
    path = store.out / "tables" / f"verdicts-{scale}"
    write_atomically(path.with_suffix(".md"), verdicts.markdown(found, scale))
    write_atomically(path.with_suffix(".csv"), verdicts.data(found).to_csv(index=False))
    files.append(f"verdicts: {path}.md, .csv")
    for name in figures.NAMES:
        if drawn := figures.draw(name, scale, records):
            figure, missing = drawn
            path = store.out / "figures" / f"{name}-{scale}"
            figures.save(figure, path)
            note = f" (not run: {', '.join(missing)})" if missing else ""
            files.append(f"figure {name.removeprefix('figure')}: {path}.png, .pdf, .svg{note}")
    console.print(said(found), highlight=False)
    for line in ["", *files]:  # none of them wrapped, so that they can be copied
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def fill_readme(path: Path) -> None:
    """Raises UserError where it, or a file that it names, can't be read, or it can't be written."""
    try:
        write_atomically(path, readme.filled(path.read_text(), path.parent))
    except OSError as error:
        raise UserError(f"readme={path} can't be filled ({error}). Without it: leave readme= out") from error
    print(f"readme:   {path}")
