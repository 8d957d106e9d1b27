"""The checkout that this runs from."""

from __future__ import annotations

import subprocess

from .spec.compose import ROOT


def git(*arguments: str) -> str | None:
    """What git prints there; None where that fails: no git, or no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
