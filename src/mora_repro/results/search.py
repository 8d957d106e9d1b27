"""The search for rates: every cell tries its recipe's grid on a seed that no table uses."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pandas as pd

from ..disk import write_atomically
from ..spec import RunSpec
from ..spec.compose import find_row
from ..spec.table import Cell
from .records import Store

LOWER_IS_BETTER = ("perplexity",)  # of the metrics by which tasks are decided


def tries(cell: Cell) -> list[list[str]]:
    """The overrides of each try: the product of the lists under `search` in the cell's recipe."""
    spec = cell.spec(0)
    row = find_row(cell.scale, cell.task, spec.method.recipe, cell.r)
    keys = list(row["search"])
    return [
        [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        for values in itertools.product(*row["search"].values())
    ]


def search_table(specs: list[RunSpec], store: Store) -> pd.DataFrame:
    """A row per try: its cell, rate and other settings, score, and whether it is its cell's best.

    The score is the task's metric, averaged over the run's evaluations, so that learning earlier counts; a try
    that diverged has none. Of equal scores the lower rate is taken. `edge` marks a best rate or
    alpha at an end of the grid. `also_trained_lr_factor` is shown where any try has one.
    """
    rows = []
    for spec in specs:
        record = store.load(spec.id)
        assert record is not None  # all tries have been made
        values = [evaluation.metrics[spec.task["metric"]] for evaluation in record.evaluations]
        alpha = (spec.method.peft or {}).get("lora_alpha")
        steps = {f"step_{e.step}": v for e, v in zip(record.evaluations, values, strict=True)}
        score = sum(values) / len(values) if record.status == "finished" else math.nan
        rows.append(
            {
                "task": spec.task["name"],
                "method": spec.method.name,
                "r": spec.r,
                "lr": spec.lr,
                "alpha": alpha,
                "seed": spec.seed,
            }
            | ({"also_trained_lr_factor": spec.training.also_trained_lr_factor} if spec.training.also_trained else {})
            | {"score": score, **steps, "record": spec.id}
        )
    table = pd.DataFrame(rows).astype({"r": "Int64", "alpha": "Int64"})
    cell = table.groupby(["method", "r"], dropna=False)
    lower = specs[0].task["metric"] in LOWER_IS_BETTER
    order = table.sort_values(["score", "lr"], ascending=[lower, True])
    table["best"] = table.index.isin(order.groupby(["method", "r"], dropna=False).head(1).index)
    ends = [table[key] == cell[key].transform(end) for key in ("lr", "alpha") for end in ("min", "max")]
    table["edge"] = table["best"] & pd.concat(ends, axis=1).fillna(False).any(axis=1)
    return table


def write_search(specs: list[RunSpec], store: Store, path: Path) -> None:
    """Write all tries to `path` (CSV), and show the best of each cell."""
    table = search_table(specs, store)
    write_atomically(path, table.to_csv(index=False))
    best = table[table.best].drop(columns=["best", "record", "seed"])
    print(f"\n{best.to_string(index=False, na_rep='-', float_format='{:.4g}'.format)}")
    print(f"\nall {len(table)} tries: {path}\nthe best of each cell belongs into conf/recipes (lr, alpha)")
