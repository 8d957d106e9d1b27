"""Figures 2 and 3: training loss by step."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..disk import write_atomically
from ..results.aggregate import CellResult, collect
from ..results.records import Record
from ..spec import RunSpec
from ..spec.table import load_table

# Okabe and Ito's colours, which the colour-blind can tell apart; line styles tell the curves apart in grey.
BLACK = "#000000"
BY_RANK = ["#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7"]
BY_METHOD = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
# Dotted, dashed, dash-dotted, long dashes, dash-dot-dotted, long dash and dot.
LINES = [(0, dashes) for dashes in ((1, 1), (4, 1.2), (5, 1, 1, 1), (9, 1.5), (5, 1, 1, 1, 1, 1), (11, 1, 2, 1))]

# Text stays text in the PDF, with its font.
STYLE: dict[Any, Any] = {"pdf.fonttype": 42, "font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8.5}


def draw(name: str, scale: str, records: Sequence[Record]) -> tuple[Figure, list[str]]:
    """A figure of conf/table, and the names of its cells that have not run (a note under it has them too)."""
    table = load_table(name)
    results = collect(table.cells(scale), records)
    ran = [result for result in results if result.records]
    missing = [result.cell.name for result in results if not result.records]
    spec = results[0].cell.spec(0)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
        for result in ran:
            _curve(axes, result, *_style(result, results))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("training step")
        axes.set_ylabel(f"training loss (mean over an epoch, {_epoch(spec)} steps)")
        axes.set_title(f"{table.title} (scale {scale})")
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        if ran:
            axes.legend(frameon=False, handlelength=3.6)
        note = textwrap.fill(_note(ran, missing), 105)
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color="#444444")
    return figure, missing


def _note(ran: Sequence[CellResult], missing: Sequence[str]) -> str:
    """What lines and bands are, and what is missing."""
    seeds = {len(result.records) for result in ran}
    if not seeds:
        lines = "No finished run."
    elif max(seeds) == 1:
        lines = "One seed."
    else:
        count = str(max(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
        lines = f"Line: mean over {count} seeds; band: smallest to largest."
    return lines + (f" Not run: {', '.join(missing)}." if missing and ran else "")


def _curve(axes: Axes, result: CellResult, colour: str, line: Any) -> None:
    """Mean over seeds of the smoothed loss, in a band from the smallest to the largest seed's."""
    losses = pd.DataFrame(
        {seed: pd.Series(r.curve.loss, index=r.curve.step) for seed, r in result.records.items() if r.curve}
    )
    spec = result.cell.spec(0)
    window = max(1, round(_epoch(spec) / spec.training.log_every))  # a logged loss is a mean since the last one
    smooth = losses.rolling(window, center=True, min_periods=1).mean()
    axes.plot(smooth.index, smooth.mean(axis=1), color=colour, linestyle=line, linewidth=1.6, label=result.cell.name)
    if smooth.shape[1] > 1:
        low, high = smooth.min(axis=1), smooth.max(axis=1)
        axes.fill_between(smooth.index, low, high, color=colour, alpha=0.18, linewidth=0)


def _epoch(spec: RunSpec) -> int:
    """Steps per epoch: over fewer, the loss differs by which pairs were drawn."""
    return math.ceil(spec.task["pairs"] / spec.training.batch_size)


def _style(result: CellResult, results: Sequence[CellResult]) -> tuple[str, Any]:
    """Every curve has a line of its own; colours go by rank where one method has ranks, else by method."""
    if result.cell.r is None:
        return BLACK, "-"
    cells = [each.cell for each in results if each.cell.r is not None]
    methods = list(dict.fromkeys(cell.method for cell in cells))
    place = cells.index(result.cell)
    colour = BY_RANK[place % 6] if len(methods) == 1 else BY_METHOD[methods.index(result.cell.method) % 6]
    return colour, LINES[place % len(LINES)]


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png (160 dpi) and `path`.pdf, each whole or not at all, the same bytes for the same figure.

    Raises OSError where they can't be written. The figure is closed.
    """
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    }
    for suffix, fields in metadata.items():
        buffer = io.BytesIO()
        with plt.rc_context(STYLE):
            figure.savefig(buffer, format=suffix, dpi=160, metadata=fields)
        write_atomically(path.with_suffix(f".{suffix}"), buffer.getvalue())
    plt.close(figure)
