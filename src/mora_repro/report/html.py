"""The report: one HTML file that needs no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from ..results.records import Record, higher_is_better
from ..spec.table import FIRST_SEARCH_SEED
from . import figures, recipes, tables, verdicts
from .tables import View

TRANSPARENT = "rgba(0,0,0,0)"
GREY = "#888888"  # legible on white and on black


@dataclass(frozen=True)
class Plot:
    """A figure of plotly's, and what it shows in words."""

    name: str
    title: str
    html: str


def page(
    views: dict[str, list[View]],
    found: dict[str, list[verdicts.Verdict]],
    records: Sequence[Record],
    peers: pd.DataFrame | None = None,
) -> str:
    """The whole report of the scales that have records.

    Args:
        views: the tables that have a run, by scale.
        found: the verdicts, by scale.
        peers: results of PEFT's method comparison (`peers.read`).
    """
    environment = Environment(
        loader=PackageLoader("mora_repro.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    scales = [
        {
            "name": scale,
            "verdicts": found[scale],
            "tables": [_table(view) for view in some],
            "recipes": recipes.used(some),
            "figures": [plot for name in figures.NAMES if (plot := _figure(name, scale, records))],
            "searches": _searches(scale, records),
            "costs": _costs(some),
        }
        for scale, some in views.items()
    ]
    shown = [record for some in views.values() for record in _behind(some)]
    return environment.get_template("report.html.j2").render(
        scales=scales,
        plotly=get_plotlyjs(),
        commands=[(record.id, record.command) for record in shown],
        machines=_machines(shown),
        shown=recipes.shown,
        peers=peers,
    )


def _behind(views: Sequence[View]) -> list[Record]:
    found = {
        record.id: record
        for view in views
        for line in view.lines
        for result in line.results
        for record in result.records.values()
    }
    return [found[key] for key in sorted(found)]


def _table(view: View) -> dict[str, object]:
    """What the template shows of a table: a cell has its text, the number it is sorted by, and its records."""
    winners = view.winners()
    rows = []
    for index, line in enumerate(view.lines):
        cells = [
            {
                "text": tables.shown(entry),
                "value": entry.ours.mean if entry.ours else None,
                "bold": first == index,
                "records": [entry.result.records[seed].id for seed in sorted(entry.values)] if entry.result else [],
            }
            for entry, first in zip(line.entries, winners, strict=True)
        ]
        paper = [{"text": tables.shown_paper(entry.paper), "value": entry.paper} for entry in line.entries]
        rows.append({"line": line, "ours": cells, "paper": paper if view.has_paper else []})
    return {
        "view": view,
        "name": view.name,
        "id": view.file,
        "title": view.table.title,
        "caption": tables.caption(view),
        "ours": view.titles,
        "paper": [tables.paper_title(column) for column in view.columns] if view.has_paper else [],
        "rows": rows,
    }


# ---------------------------------------------------------------------------------------------------
# Plots


def _figure(name: str, scale: str, records: Sequence[Record]) -> Plot | None:
    """A figure of the paper; None where no cell of it has run."""
    return _spectra(scale, records) if name == figures.SPECTRUM else _curves(name, scale, records)


def _curves(name: str, scale: str, records: Sequence[Record]) -> Plot | None:
    """A figure's training losses."""
    found, results = figures.curves(name, scale, records)
    if not found:
        return None
    figure = go.Figure()
    for curve in found:
        colour, line = figures.style(curve.result, results)
        dash = _dash(line)
        steps = list(curve.mean.index)
        if len(curve.result.records) > 1:
            figure.add_scatter(
                x=steps + steps[::-1],
                y=[*curve.high, *curve.low[::-1]],
                fill="toself",
                fillcolor=colour,
                opacity=0.15,
                line_width=0,
                hoverinfo="skip",
                showlegend=False,
                legendgroup=curve.result.cell.name,
            )
        figure.add_scatter(
            x=steps,
            y=list(curve.mean),
            name=curve.result.cell.name,
            legendgroup=curve.result.cell.name,
            line={"color": GREY if colour == figures.BLACK else colour, "dash": dash, "width": 2},
            hovertemplate="step %{x}: %{y:.4f}",
        )
    title = figures.title(name, scale)
    return _plot(figure, f"{name}-{scale}", title, "training step", "training loss", y_log=True)


def _dash(line: Any) -> str:
    """A line style of matplotlib's, as plotly has it."""
    return "solid" if line == "-" else ",".join(f"{2 * length:g}px" for length in line[1])


def _spectra(scale: str, records: Sequence[Record]) -> Plot | None:
    """Figure 5."""
    found, results = figures.spectra(scale, records)
    if found.empty:
        return None
    figure = go.Figure()
    for name in found.columns:
        colour, hatch = figures.bar_style(str(name), results)
        marker = {"color": colour, "pattern_shape": hatch}
        figure.add_bar(
            x=list(found.index), y=list(found[name]), name=name, marker=marker, hovertemplate="%{x}: %{y:.1f}"
        )
    title = figures.title(figures.SPECTRUM, scale)
    return _plot(figure, f"{figures.SPECTRUM}-{scale}", title, "linear layer", figures.COUNTED)


def _searches(scale: str, records: Sequence[Record]) -> list[Plot]:
    """The tries of the rate searches: the task's metric by rate, a plot per task and a line per method and rank."""
    tries = [r for r in records if r.spec.scale == scale and r.spec.seed >= FIRST_SEARCH_SEED and r.metrics]
    plots = []
    for task in sorted({record.spec.task["name"] for record in tries}):
        figure = go.Figure()
        of_task = [record for record in tries if record.spec.task["name"] == task]
        metric = of_task[0].spec.task["metric"]
        cells: dict[str, dict[str, list[Record]]] = {}
        for record in sorted(of_task, key=lambda record: (record.spec.name, _beside_rate(record), record.spec.lr)):
            cells.setdefault(record.spec.name, {}).setdefault(_beside_rate(record), []).append(record)
        for index, (name, lines) in enumerate(cells.items()):
            for place, (beside, some) in enumerate(lines.items()):
                dash = _dash(figures.LINES[place % len(figures.LINES)])
                figure.add_scatter(
                    x=[record.spec.lr for record in some],
                    y=[record.metrics[metric] for record in some],
                    name=f"{name} {beside}".strip(),
                    mode="lines+markers",
                    line={"color": figures.BY_METHOD[index % 6], "dash": dash},
                    marker={"symbol": index, "size": 8},
                    hovertemplate="lr %{x:.2g}: %{y:.2f}",
                )
        title = f"{task}: all tries of the rate search"
        plots.append(_plot(figure, f"search-{task}-{scale}", title, "learning rate", metric, x_log=True))
    return plots


def _beside_rate(record: Record) -> str:
    """What a search may vary beside the rate, in words."""
    alpha = (record.spec.method.peft or {}).get("lora_alpha")
    factor = record.spec.training.also_trained_lr_factor
    words = [f"alpha {alpha:g}"] if alpha is not None else []
    return " ".join([*words, *([f"embeddings' rate x{factor:g}"] if factor != 1 else [])])


def _costs(views: Sequence[View]) -> list[Plot]:
    """Each task's deciding metric against trainable parameters, memory and time."""
    points: dict[tuple[str, str], dict[str, tuple[str, float, Record]]] = {}
    for view in views:
        for line in view.lines:
            for column, entry in zip(view.columns, line.entries, strict=True):
                if entry.ours and entry.result and column.evaluation == -1:
                    [record, *_] = entry.result.records.values()
                    measured = (entry.result.cell.task, entry.metric)
                    # The same runs may stand in several tables.
                    named = (entry.result.cell.name, entry.ours.mean, record)
                    points.setdefault(measured, {}).setdefault(record.id, named)
    plots = []
    axes = {"trainable parameters": "parameters", "peak memory (MB)": "memory", "training time (s)": "time"}
    for (task, metric), cells in points.items():
        for title, kind in axes.items():
            figure = go.Figure()
            costs = {name: (_cost(record, kind), mean) for name, mean, record in cells.values()}
            front = sorted(point for point in costs.values() if not _beaten(point, costs.values(), metric))
            figure.add_scatter(
                x=[cost for cost, _ in front],
                y=[mean for _, mean in front],
                name="best at its cost (Pareto front)",
                mode="lines",
                line={"color": GREY, "dash": "dot", "width": 1.5, "shape": "hv"},
                hoverinfo="skip",
            )
            for index, (name, (cost, mean)) in enumerate(costs.items()):
                marker = {"symbol": index % 12, "size": 11, "color": figures.BY_METHOD[index % 6]}
                figure.add_scatter(x=[cost], y=[mean], name=name, mode="markers", marker=marker)
            what = f"{task}: {metric}"
            plots.append(_plot(figure, f"cost-{kind}-{what}", f"{what} by {title}", title, what, kind == "parameters"))
    return plots


def _cost(record: Record, kind: str) -> float:
    assert record.parameters is not None and record.cost is not None  # it finished
    costs = {
        "parameters": record.parameters.trainable,
        "memory": record.cost.peak_memory_mb,
        "time": record.cost.train_s,
    }
    return costs[kind]


def _beaten(point: tuple[float, float], others: Iterable[tuple[float, float]], metric: str) -> bool:
    """Whether another (cost, metric) costs no more and is no worse, and not the same in both."""
    sign = 1 if higher_is_better(metric) else -1
    cost, value = point
    return any(other != point and other[0] <= cost and sign * other[1] >= sign * value for other in others)


def _plot(figure: go.Figure, name: str, title: str, x: str, y: str, x_log: bool = False, y_log: bool = False) -> Plot:
    figure.update_layout(
        paper_bgcolor=TRANSPARENT,
        plot_bgcolor=TRANSPARENT,
        font_color=GREY,
        margin={"l": 60, "r": 10, "t": 10, "b": 50},
        legend={"orientation": "h", "y": -0.2},
        height=420,
        hovermode="closest",
    )
    grid = {"gridcolor": "rgba(136,136,136,0.25)", "zeroline": False}
    figure.update_xaxes(title=x, type="log" if x_log else "linear", **grid)
    figure.update_yaxes(title=y, type="log" if y_log else "linear", **grid)
    name = "".join(c if c.isalnum() else "-" for c in name)
    inner = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"responsive": True, "displaylogo": False}
    )
    return Plot(name, title, inner)


def _machines(records: Sequence[Record]) -> list[dict[str, object]]:
    """The machines and versions that the runs had, with how many runs each."""
    kinds = Counter(
        (
            record.environment.cpu,
            record.environment.cores,
            ", ".join(record.environment.gpus) or "no GPU",
            record.environment.python,
            ", ".join(f"{name} {number}" for name, number in sorted(record.environment.packages.items())),
        )
        for record in records
    )
    keys = ("cpu", "cores", "gpus", "python", "packages")
    return [{**dict(zip(keys, kind, strict=True)), "runs": runs} for kind, runs in kinds.most_common()]
