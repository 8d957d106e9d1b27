"""The results of PEFT's method comparison (huggingface/peft, method_comparison/*/results) as further rows.

They follow protocols of their own: another model, other steps, one seed. So they are shown beside our tables, grouped
by protocol, and never in them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ValidationError

from ..errors import UserError


class TrainConfig(BaseModel):
    model_id: str
    dtype: str
    max_steps: int
    batch_size: int
    seed: int
    lr_scheduler: str | None = None
    optimizer_kwargs: dict[str, Any] = {}


class RunInfo(BaseModel):
    created_at: str
    experiment_name: str
    train_config: TrainConfig
    peft_config: dict[str, Any] | None = None


class TrainInfo(BaseModel):
    status: str
    train_time: float
    num_trainable_params: int
    metrics: list[dict[str, float]]
    cuda_memory_max: float | None = None
    accelerator_memory_max: float | None = None


class Result(BaseModel):
    """The parts of a result file that are shown; its other keys are left aside."""

    run_info: RunInfo
    train_info: TrainInfo


def read(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """A row per successful run with a test accuracy, best first within its protocol, and a line per file left out.

    Raises UserError where the folder has no such result.
    """
    if not folder.is_dir():
        raise UserError(
            f"peers={folder} is no folder. It should hold result files of PEFT's method comparison (*.json)"
        )
    rows, problems = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            found = Result.model_validate_json(path.read_text())
        except (ValidationError, UnicodeDecodeError) as error:
            first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            problems.append(f"{path}: no result of PEFT's method comparison ({first}); left out")
            continue
        row = _row(found)
        if row is None:
            problems.append(f"{path}: status {found.train_info.status}, or no test accuracy; left out")
            continue
        rows.append(row)
    if not rows:
        said = "\n       ".join(problems[:5]) or "no *.json files"
        raise UserError(f"peers={folder} has no result of PEFT's method comparison: {said}")
    table = pd.DataFrame(rows).astype({"r": "Int64"})
    return table.sort_values(["protocol", "test accuracy"], ascending=[True, False]).reset_index(drop=True), problems


def _row(found: Result) -> dict[str, Any] | None:
    run, train = found.run_info, found.train_info
    accuracy = next((each["test accuracy"] for each in reversed(train.metrics) if "test accuracy" in each), None)
    if train.status != "success" or accuracy is None:
        return None
    config, peft = run.train_config, run.peft_config or {}
    memory = train.accelerator_memory_max or train.cuda_memory_max
    settings = {"dtype": config.dtype, "steps": config.max_steps, "batch": config.batch_size}
    return {
        "protocol": f"{config.model_id}, {json.dumps(settings)[1:-1]}".replace('"', ""),
        "experiment": run.experiment_name,
        "method": peft.get("peft_type", "full fine-tuning"),
        "r": peft.get("r") if isinstance(peft.get("r"), int) else None,
        "lr": config.optimizer_kwargs.get("lr"),
        "seed": config.seed,
        "trainable": train.num_trainable_params,
        "test accuracy": 100 * accuracy,
        "memory (GB)": memory / 1e9 if memory else None,
        "time (s)": train.train_time,
        "created": run.created_at[:10],
    }


def markdown(table: pd.DataFrame) -> str:
    """A table per protocol."""
    parts = ["Results of PEFT's method comparison: other protocols than ours, one seed each, so never in our tables."]
    for protocol, some in table.groupby("protocol"):
        shown = some.drop(columns=["protocol", "created"]).round({"test accuracy": 1, "memory (GB)": 1, "time (s)": 0})
        parts.append(f"**{protocol}**\n\n{shown.to_markdown(index=False)}")
    return "\n\n".join(parts) + "\n"
