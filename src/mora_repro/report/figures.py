"""Figures 2 and 3: training loss by step."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..results.aggregate import CellResult, collect
from ..results.records import Record
from ..spec.table import load_table

# Okabe and Ito's colours, which the colour-blind can tell apart; line styles tell them apart in grey.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
LORA_STYLES = [
    (SKY, ":"),
    (BLUE, "-."),
    (GREEN, "--"),
    (ORANGE, (0, (5, 1))),
    (VERMILION, (0, (3, 1, 1, 1))),
    (PURPLE, "-"),
]


def draw(name: str, scale: str, records: list[Record]) -> tuple[Figure, list[str]]:
    """A figure, and the names of its cells that have not run."""
    table = load_table(name)
    results = collect(table.cells(scale), records)
    ran = [result for result in results if result.records]
    missing = [_label(result) for result in results if not result.records]
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    by_rank = sorted({result.cell.r for result in results if result.cell.method == "lora" and result.cell.r})
    for result in ran:
        _curve(axes, result, _style(result, by_rank))
    steps = max((record.curve.step[-1] for r in ran for record in r.records.values() if record.curve), default=1)
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel(f"training loss (mean of {_window(steps)} steps)")
    seeds = {len(result.records) for result in ran}
    how_many = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else str(max(seeds, default=0))
    axes.set_title(
        f"{table.title} (scale {scale}, {how_many} seed{'s' if max(seeds, default=0) > 1 else ''})", fontsize=9
    )
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure, missing


def _curve(axes: Axes, result: CellResult, style: tuple[str, object]) -> None:
    """Mean over seeds of the smoothed loss, in a band from the smallest to the largest seed's."""
    losses = pd.DataFrame(
        {
            seed: pd.Series(record.curve.loss, index=record.curve.step)
            for seed, record in result.records.items()
            if record.curve
        }
    )
    smooth = losses.rolling(_window(int(losses.index[-1])), center=True, min_periods=1).mean()
    color, line = style
    axes.plot(smooth.index, smooth.mean(axis=1), color=color, linestyle=line, linewidth=1.6, label=_label(result))
    if smooth.shape[1] > 1:
        axes.fill_between(smooth.index, smooth.min(axis=1), smooth.max(axis=1), color=color, alpha=0.15, linewidth=0)


def _window(steps: int) -> int:
    """One epoch of the mini task, or about 1.5 % of the run: the loss of single batches is noise."""
    return max(1, round(steps / 75))


def _label(result: CellResult) -> str:
    title = result.cell.spec(0).method.title
    return title if result.cell.r is None else f"{title} r={result.cell.r}"


def _style(result: CellResult, ranks: list[int]) -> tuple[str, object]:
    cell = result.cell
    if cell.method == "fft":
        return BLACK, "-"
    if len(ranks) > 2:
        return LORA_STYLES[ranks.index(cell.r or 0) % len(LORA_STYLES)]
    color = BLUE if cell.method == "lora" else VERMILION
    return color, ":" if cell.r == min(ranks) else "--"


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png (160 dpi) and `path`.pdf, the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, metadata in (
        ("png", {"Software": None}),
        ("pdf", {"CreationDate": None, "Producer": None, "Creator": None}),
    ):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=160, metadata=metadata)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getvalue())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path.with_suffix(f".{suffix}"))
    plt.close(figure)
