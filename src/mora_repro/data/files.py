"""Rows of text from a user's files or from the hub, with errors that name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import UserError

SUFFIXES = (".jsonl", ".parquet")


def read_folder(folder: str, split: str, columns: list[str], limit: int | None = None) -> list[dict[str, str]]:
    """The text columns of `<folder>/<split>.jsonl` or `.parquet`, at most `limit` rows.

    Raises UserError: no such folder or file, a line that is no JSON object, a missing column, a value that is
    no text, no rows.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(
            f"task.data={folder} is no folder. It should hold train.jsonl and test.jsonl with {_named(columns)} in "
            f"each line; without files: task.data=generated"
        )
    found = [root / f"{split}{suffix}" for suffix in SUFFIXES if (root / f"{split}{suffix}").is_file()]
    if not found:
        there = ", ".join(sorted(path.name for path in root.iterdir())) or "nothing"
        raise UserError(f"{root} has no {split}.jsonl or {split}.parquet; it holds {there}.")
    try:
        rows = _jsonl(found[0], limit) if found[0].suffix == ".jsonl" else _parquet(found[0], limit)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{found[0]} can't be read as UTF-8 text or parquet ({error}).") from error
    for where, row in rows:
        for column in columns:
            if column not in row:
                raise UserError(
                    f"{where} has no {column!r}; it has {_named(list(row))}, and {_named(columns)} are needed."
                )
            if not isinstance(row[column], str):
                raise UserError(f"{where}: {column!r} should be text, and is {row[column]!r}.")
    if not rows:
        raise UserError(f"{found[0]} has no rows; {_named(columns)} are expected in each.")
    return [{column: row[column] for column in columns} for _, row in rows]


def _jsonl(path: Path, limit: int | None) -> list[tuple[str, dict[str, Any]]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(rows) >= limit:
                break
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where} is no JSON ({error.msg}): {line.strip()[:60]!r}. One object per line."
                ) from None
            if not isinstance(row, dict):
                raise UserError(f"{where} should be a JSON object, and is {line.strip()[:60]!r}.")
            rows.append((where, row))
    return rows


def _parquet(path: Path, limit: int | None) -> list[tuple[str, dict[str, Any]]]:
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no parquet file ({str(error).splitlines()[0]}).") from None
    return [(f"{path}, row {number}", row) for number, row in enumerate(table.head(limit).to_dict("records"), 1)]


def read_hub(path: str, name: str | None, split: str, columns: list[str], limit: int | None) -> list[dict[str, str]]:
    """The columns of a data set of the hub. Raises UserError where it can't be had."""
    import datasets

    try:
        rows = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # the hub's client raises some twenty kinds
        raise UserError(
            f"the data set {path} can't be had ({type(error).__name__}: {str(error).splitlines()[0][:200]}). On a "
            f"machine with internet, this command keeps it in the cache of `datasets`. Or make a folder with "
            f"train.jsonl and test.jsonl, 'question' and 'answer' in each line: task.data=<folder>"
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(f"{path} has no {_named(missing)}; it has {_named(rows.column_names)}.")
    kept = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return [{column: row[column] for column in columns} for row in kept]


def _named(columns: list[str]) -> str:
    return ", ".join(repr(column) for column in columns)
