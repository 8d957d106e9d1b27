"""Secrets do not belong on a command line: overrides are kept in records, in logs, and in the shell's history."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from ..errors import UserError

SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD")
MIN_LENGTH = 8  # shorter values of such variables, as KEY=1, are found everywhere

# A name that ends in one of these, before = or (in a dictionary) before a colon.
_NAMED = re.compile(r"""(?<![a-z0-9])(token|api_?key|access_?key|secret|passw(or)?d)["']?\s*[=:]""", re.IGNORECASE)
_IN_URL = re.compile(r"://[^/\s@]+@")


def refuse_secrets(overrides: Sequence[str]) -> None:
    """Raise UserError, which does not repeat the secret, where an override holds one.

    That is the value of an environment variable whose name ends in one of SECRET_NAMES, a key named like a secret, or
    a URL with credentials.
    """
    kept = list(_kept_in_the_environment())
    for number, text in enumerate(overrides, 1):
        key = text.partition("=")[0]
        named = "=" in text and not _IN_URL.search(key) and not any(value in key for _, value in kept)
        place = f"{key}=..." if named else f"argument {number}"
        if variable := next((name for name, value in kept if value in text), None):
            raise _refused(place, f"holds the value of the environment variable {variable}")
        if _NAMED.search(text):
            raise _refused(place, "looks like a secret")
        if _IN_URL.search(text):
            raise _refused(place, "holds a URL with credentials (user:password@)")


def _kept_in_the_environment() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if name.upper().endswith(SECRET_NAMES) and len(value) >= MIN_LENGTH:
            yield name, value


def _refused(place: str, why: str) -> UserError:
    return UserError(
        f"{place} {why}, and overrides are written into records and logs. Pass it by the environment (HF_TOKEN, "
        f"WANDB_API_KEY, ...), or log in once: hf auth login, wandb login"
    )
