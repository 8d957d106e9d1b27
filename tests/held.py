"""Tasks whose evaluation waits for as long as a test holds it: what the test does finds the run in the middle.

A run of a few steps would else be over before a slow moment of the machine is.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from processes import until
from tiny import ROOT

from mora_repro.data.benchmarks import Questions
from mora_repro.data.gsm8k import Gsm8k
from mora_repro.data.uuid import Uuid
from mora_repro.spec.run_spec import Eval

HOLD = "MORA_TESTS_HOLD"  # the environment's variable with the path of a file: as long as it is there, runs wait


def _held(questions: Questions) -> Questions:
    def score(answer: str, gold: str) -> dict[str, tuple[float, float]]:
        hold = Path(os.environ.get(HOLD, "/nowhere"))
        while hold.exists():
            _waits(hold).touch()
            time.sleep(0.02)
        return questions.score(answer, gold)

    return replace(questions, score=score)


def _waits(hold: Path) -> Path:
    return hold.with_name(f"{hold.name}-waits")


class _Held:
    def benchmarks(self, settings: Eval) -> Sequence[Questions]:
        return [_held(questions) for questions in super().benchmarks(settings)]


class HeldUuid(_Held, Uuid):
    pass


class HeldGsm8k(_Held, Gsm8k):
    pass


HELD_UUID = "task._target_=held.HeldUuid"
HELD_GSM8K = "task._target_=held.HeldGsm8k"


@contextmanager
def holding(hold: Path) -> Iterator[None]:
    """Within, runs whose environment has this file as HOLD wait in their next evaluation."""
    _waits(hold).unlink(missing_ok=True)
    hold.touch()
    try:
        yield
    finally:
        hold.unlink()


@contextmanager
def held(hold: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Python with these arguments, in a session of its own; within, one of its runs waits.

    An error where the process ends before it waits.
    """
    with holding(hold):
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | {HOLD: str(hold)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        until(lambda: _waits(hold).exists() or process.poll() is not None, "no evaluation")
        assert process.poll() is None, process.communicate()[1]
        yield process


def stopped(hold: Path, number: int, *arguments: str) -> tuple[int, str]:
    """Send a signal to such a process while its run waits; its exit status and what it said."""
    with held(hold, *arguments) as process:
        process.send_signal(number)
        said = ""
        while "stopping after this step" not in said and (line := process.stderr.readline()):
            said += line
    said += process.communicate()[1]
    return process.returncode, said
