"""Composed specs, kept between processes: composing one takes a tenth of a second, and all tables have a hundred."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from .compose import CONF, compose_config
from .run_spec import NAMING_FILES, RunSpec


def spec_of(overrides: list[str]) -> RunSpec:
    """What the overrides compose to. Raises UserError where they can't be composed.

    It is kept in the user's cache folder, by all of conf/ and the code of this package. Specs with files or folders of
    the user's are not, since their ids follow the contents.
    """
    if any(text.startswith((*NAMING_FILES, "eval.data")) for text in overrides):
        return RunSpec.from_config(compose_config(overrides))
    key = json.dumps(overrides)
    if key in (known := _known()):
        with suppress(ValidationError):
            return RunSpec.model_validate_json(known[key])
    spec = RunSpec.from_config(compose_config(overrides))
    known[key] = spec.model_dump_json()
    with suppress(OSError):  # a cache that can't be written is none
        _place().parent.mkdir(parents=True, exist_ok=True)
        with _place().open("a") as file:
            file.write(json.dumps([key, known[key]]) + "\n")
    return spec


@cache
def _known() -> dict[str, str]:
    """The specs kept so far; a line that another process has not ended yet is passed over."""
    known = {}
    with suppress(OSError):
        for line in _place().read_text().splitlines():
            with suppress(json.JSONDecodeError):
                key, spec = json.loads(line)
                known[key] = spec
    return known


@cache
def _place() -> Path:
    digest = hashlib.sha256()
    for path in sorted([*CONF.rglob("*.yaml"), *Path(__file__).parent.glob("*.py")]):
        digest.update(f"{path}\0".encode() + path.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "mora-repro" / f"specs-{digest.hexdigest()[:16]}.jsonl"
