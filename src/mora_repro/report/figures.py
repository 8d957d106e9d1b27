"""Figures 2 to 4: training loss by step. Figure 5: singular values by kind of linear layer."""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ..disk import write_atomically
from ..results.aggregate import CellResult, collect
from ..results.records import Record
from ..spec.table import load_table

CURVES = ("figure2", "figure3", "figure4")
SPECTRUM = "figure5"
COUNTED = "singular values above 0.1, mean"
NAMES = (*CURVES, SPECTRUM)

# Okabe and Ito's colours, which the colour-blind can tell apart; line styles tell the curves apart in grey.
BLACK = "#000000"
BY_RANK = ["#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7"]
BY_METHOD = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
HATCHES = ["", "/", ".", "x"]
# Dotted, dashed, dash-dotted, long dashes, dash-dot-dotted, long dash and dot.
LINES = [(0, dashes) for dashes in ((1, 1), (4, 1.2), (5, 1, 1, 1), (9, 1.5), (5, 1, 1, 1, 1, 1), (11, 1, 2, 1))]

# Text stays text in the PDF, with its font.
STYLE: dict[Any, Any] = {
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "mora",  # the same bytes for the same figure
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Curve:
    """A cell's training loss by step: smoothed, then mean, smallest and largest over the seeds."""

    result: CellResult
    mean: pd.Series
    low: pd.Series
    high: pd.Series


def curves(name: str, scale: str, records: Sequence[Record]) -> tuple[list[Curve], list[CellResult]]:
    """The curves of a figure of conf/table, and all its cells, also those that have not run."""
    results = collect(load_table(name).cells(scale), records)
    return [_smoothed(result) for result in results if result.records], results


def spectra(scale: str, records: Sequence[Record]) -> tuple[pd.DataFrame, list[CellResult]]:
    """Figure 5: for each kind of linear layer (a row) and cell with a spectrum (a column), the mean over layers and
    seeds of how many singular values of the update are above the threshold; and all its cells."""
    results = collect(load_table(SPECTRUM).cells(scale), records)
    columns = {}
    for result in results:
        if found := [record.spectrum.above for record in result.records.values() if record.spectrum]:
            counts = {kind: [count for above in found for count in above[kind]] for kind in found[0]}
            means = {kind.removesuffix("_proj"): statistics.fmean(some) for kind, some in counts.items()}
            columns[result.cell.name] = pd.Series(means)
    return pd.DataFrame(columns), results


def title(name: str, scale: str) -> str:
    return f"{load_table(name).title} (scale {scale})"


def _smoothed(result: CellResult) -> Curve:
    losses = pd.DataFrame(
        {seed: pd.Series(r.curve.loss, index=r.curve.step) for seed, r in result.records.items() if r.curve}
    )
    spec = result.cell.spec(0)
    window = max(1, round(_window(result) / spec.training.log_every))  # a logged loss is a mean since the last one
    smooth = losses.rolling(window, center=True, min_periods=1).mean()
    return Curve(result, smooth.mean(axis=1), smooth.min(axis=1), smooth.max(axis=1))


def _window(result: CellResult) -> int:
    """Steps that a loss is averaged over: an epoch where there are many, since over fewer it differs by which samples
    were drawn; else a fiftieth of the run."""
    [record, *_] = result.records.values()
    assert record.curve is not None and record.data is not None  # it finished
    steps = record.curve.step[-1]
    epoch = math.ceil(record.data.examples / record.spec.training.batch_size)
    return epoch if 10 * epoch <= steps else max(1, steps // 50)


def draw(name: str, scale: str, records: Sequence[Record]) -> tuple[Figure, list[str]] | None:
    """A figure of conf/table, and the names of its cells that have not run (a note under it has them too).

    None where no cell has.
    """
    return _draw_spectra(scale, records) if name == SPECTRUM else _draw_curves(name, scale, records)


def _draw_spectra(scale: str, records: Sequence[Record]) -> tuple[Figure, list[str]] | None:
    found, results = spectra(scale, records)
    if found.empty:
        return None
    missing = [result.cell.name for result in results if result.cell.name not in found]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        width = 0.8 / len(found.columns)
        for place, name in enumerate(found.columns):
            colour, hatch = bar_style(str(name), results)
            at = [kind - 0.4 + (place + 0.5) * width for kind in range(len(found))]
            axes.bar(at, found[name], width, label=name, color=colour, hatch=2 * hatch, edgecolor="white")
        axes.set_xticks(range(len(found)), [str(kind) for kind in found.index])
        axes.set_ylabel(COUNTED)
        axes.set_title(title(SPECTRUM, scale))
        axes.grid(axis="y", alpha=0.3, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=2)
        seeds = max(sum(r.spectrum is not None for r in result.records.values()) for result in results)
        note = f"Mean over layers and {seeds} seed{'s' * (seeds > 1)}; of methods that merge, the accumulated update."
        note += f" Not run, or not counted: {', '.join(missing)}." if missing else ""
        figure.supxlabel(textwrap.fill(note, 105), x=0.01, ha="left", fontsize=7.5, color="#444444")
    return figure, missing


def bar_style(name: str, results: Sequence[CellResult]) -> tuple[str, str]:
    """The colour and the hatch of a cell's bars, the same whichever others have run."""
    place = [result.cell.name for result in results].index(name)
    return BY_METHOD[place], HATCHES[place]


def _draw_curves(name: str, scale: str, records: Sequence[Record]) -> tuple[Figure, list[str]] | None:
    found, results = curves(name, scale, records)
    if not found:
        return None
    missing = [result.cell.name for result in results if not result.records]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
        for curve in found:
            colour, line = style(curve.result, results)
            label = curve.result.cell.name
            axes.plot(curve.mean.index, curve.mean, color=colour, linestyle=line, linewidth=1.6, label=label)
            if len(curve.result.records) > 1:
                axes.fill_between(curve.mean.index, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("training step")
        axes.set_ylabel(f"training loss (mean over {_window(found[0].result)} steps)")
        axes.set_title(title(name, scale))
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        axes.legend(frameon=False, handlelength=3.6)
        note = textwrap.fill(_note([curve.result for curve in found], missing), 105)
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color="#444444")
    return figure, missing


def _note(ran: Sequence[CellResult], missing: Sequence[str]) -> str:
    """What lines and bands are, and what is missing."""
    seeds = {len(result.records) for result in ran}
    if max(seeds) == 1:
        lines = "One seed."
    else:
        count = str(max(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
        lines = f"Line: mean over {count} seeds; band: smallest to largest."
    return lines + (f" Not run: {', '.join(missing)}." if missing else "")


def style(result: CellResult, results: Sequence[CellResult]) -> tuple[str, Any]:
    """Every curve has a line of its own; colours go by rank where one method has ranks, else by method."""
    if result.cell.method == "fft":
        return BLACK, "-"
    cells = [each.cell for each in results if each.cell.method != "fft"]
    methods = list(dict.fromkeys(cell.method for cell in cells))
    place = cells.index(result.cell)
    colour = BY_RANK[place % 6] if len(methods) == 1 else BY_METHOD[methods.index(result.cell.method) % 6]
    return colour, LINES[place % len(LINES)]


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png (160 dpi), .pdf and .svg, each whole or not at all, the same bytes for the same figure.

    Raises OSError where they can't be written. The figure is closed.
    """
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        "svg": {"Date": None, "Creator": None},
    }
    for suffix, fields in metadata.items():
        buffer = io.BytesIO()
        with plt.rc_context(STYLE):
            figure.savefig(buffer, format=suffix, dpi=160, metadata=fields)
        write_atomically(path.with_suffix(f".{suffix}"), buffer.getvalue())
    plt.close(figure)
