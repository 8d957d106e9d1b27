"""All methods with their trainable parameters on LLaMA-2 7B: `scripts/methods.py`, and what --help shows."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from ..spec import RunSpec, compose_config
from ..spec.compose import METHODS_CSV, off_budget, options
from .base import on_meta_device
from .method import apply_method, count_parameters

RANKS = (8, 256)


def main() -> int:
    """Count, write results/methods.csv, print the table."""
    rows = methods()
    write(METHODS_CSV, rows)
    table = Table("method", *(f"r={r}" for r in RANKS), "source", title="trainable parameters on LLaMA-2 7B")
    for row in rows:
        table.add_row(str(row["method"]), *(_shown(row, r) for r in RANKS), str(row["source"]))
    console = Console()
    console.print(table)
    lora = " and ".join(f"{rows[0][f'lora_r{r}']:,} at r={r}" for r in RANKS)
    console.print(f"LoRA has {lora}. †: more than 2 % off LoRA's at the same r\nwritten: {METHODS_CSV}")
    return 0


def methods() -> list[dict[str, str | int]]:
    """A row per method of conf/method, whose counts need none of the model's memory.

    A method without a rank has the same count at every r. `peft`, which is any method, has none.
    """
    lora = {r: trainable("lora", r) for r in RANKS}
    rows: list[dict[str, str | int]] = []
    for name in options("method"):
        method = compose_config([f"method={name}", "task=uuid", "scale=paper"]).method
        row: dict[str, str | int] = {"method": name, "title": method.title, "source": method.source}
        any_peft = method.peft is not None and OmegaConf.is_missing(method.peft, "_target_")
        for r in RANKS:
            row[f"r{r}"] = "" if any_peft else trainable(name, r if method.ranked else None)
            row[f"lora_r{r}"] = lora[r]
        rows.append(row)
    return rows


def trainable(method: str, r: int | None, model: str = "llama2_7b") -> int:
    """Trainable parameters of a method at a rank on a model of conf/model, at scale paper."""
    rank = [] if r is None else [f"r={r}"]
    overrides = [f"method={method}", *rank, "task=uuid", "scale=paper", f"model={model}"]
    # What has no effect on the count, and some methods refuse.
    spec = RunSpec.from_config(compose_config([*overrides, "trainer=plain", "trainer.gradient_checkpointing=false"]))
    with warnings.catch_warnings(action="ignore"):
        return count_parameters(apply_method(on_meta_device(spec), spec))[0]


def write(path: Path, rows: list[dict[str, str | int]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _shown(row: dict[str, str | int], r: int) -> str:
    if not row[f"r{r}"]:
        return "-"
    return f"{row[f'r{r}']:,}{' †' if off_budget(row, r) else ''}"
