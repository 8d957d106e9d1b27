"""The parts of a README that are generated: files of the report, between two comments."""

from __future__ import annotations

import re
from pathlib import Path

PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def filled(text: str, folder: Path) -> str:
    """The text with every part between `<!-- generated: <file> -->` and `<!-- end -->` replaced by the file as it is.

    Files are relative to `folder`. Raises OSError for a file that can't be read.
    """
    return PART.sub(lambda found: f"{found[1]}\n{(folder / found[2]).read_text()}\n{found[3]}", text)
