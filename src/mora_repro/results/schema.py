"""docs/record.schema.json: the JSON Schema of a record, for those who read records without this package."""

from __future__ import annotations

import json

from ..disk import write_atomically
from ..spec.compose import ROOT
from .records import Record

PLACE = ROOT / "docs" / "record.schema.json"


def main() -> None:
    """Writes it."""
    write_atomically(PLACE, text())
    print(f"written: {PLACE}")


def text() -> str:
    return json.dumps(Record.model_json_schema(), indent=1) + "\n"
