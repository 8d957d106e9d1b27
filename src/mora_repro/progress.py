"""Progress of long work on stderr: a bar on a terminal, elsewhere a line every half a minute."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .distributed import is_main, say

CONSOLE = Console(stderr=True)  # one, so that a bar within another's work stands below it
EVERY = 30  # seconds between lines where there is no terminal


class Bar:
    """How many of `total` are done, with the time left; shown by rank 0. A context around the work."""

    def __init__(self, title: str, total: int):
        self.title, self.total = title, total
        self.done, self.said = 0, time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.completed}/{task.total} left"),
            TimeRemainingColumn(compact=True),
            console=CONSOLE,
            transient=True,
            disable=not (CONSOLE.is_terminal and is_main()),
        )
        self.bar = self.progress.add_task(title, total=total)

    def advance(self, by: int) -> None:
        self.done += by
        self.progress.update(self.bar, completed=self.done)
        if self.progress.disable and time.monotonic() - self.said > EVERY:
            self.said = time.monotonic()
            say(f"{self.title}: {self.done} of {self.total}")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
