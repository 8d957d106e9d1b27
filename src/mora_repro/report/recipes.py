"""Table 5: the recipes that the runs of the tables used, from their records."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .tables import View


def used(views: Sequence[View]) -> pd.DataFrame:
    """A row per cell that has run: how it was trained. Seeds of a cell share their recipe."""
    rows = {}
    for view in views:
        for line in view.lines:
            for result in line.results:
                for record in result.records.values():
                    spec, training = record.spec, record.spec.training
                    peft = spec.method.peft or {}
                    rows[result.cell] = {
                        "task": spec.task["name"],
                        "model": spec.model.title,
                        "method": spec.method.title,
                        "r": spec.r,
                        "operator": peft.get("operator"),
                        "alpha": peft.get("lora_alpha"),
                        "lr": spec.lr,
                        "batch": training.batch_size,
                        "steps": record.curve.step[-1] if record.curve else None,
                        "epochs": training.epochs,
                        "schedule": training.schedule,
                        "warm-up": training.warmup_steps,
                        "length": training.max_length,
                    }
    table = pd.DataFrame(list(rows.values()))
    return table.astype({"r": "Int64", "steps": "Int64"}).dropna(axis="columns", how="all")


def shown(value: object) -> str:
    return "-" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


def markdown(views: Sequence[View], scale: str) -> str:
    text = used(views).astype(object).map(shown)
    head = f"The paper's Table 5: hyperparameters. Ours: scale {scale}, as the runs' records have them."
    return f"{head}\n\n{text.to_markdown(index=False, disable_numparse=True)}\n"
