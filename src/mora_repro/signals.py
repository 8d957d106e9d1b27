"""Signals that end a process or ask it to end, and who answers them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE_SECONDS = 10


@contextmanager
def answered_by(handler: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[dict[signal.Signals, Any]]:
    """Within: the signals are the handler's, also where they were ignored; yields the handlers that were there."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield before
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def interrupt(*_: Any) -> None:
    """The handler of SIGINT that Python starts with."""
    raise KeyboardInterrupt


def wait_to_be_ended() -> bool:
    """Leave it to the first of several processes to say why all fail; whether this one was ended meanwhile.

    A launcher ends all of them as soon as one has ended, which may be before the first has come to its word.
    """
    try:
        time.sleep(PATIENCE_SECONDS)
    except KeyboardInterrupt:
        return True
    return False


def interrupts_by_every_signal() -> None:
    """SIGTERM, SIGUSR1 (of Slurm, before a time limit) and SIGHUP raise KeyboardInterrupt, as SIGINT does."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, interrupt)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, interrupt)
