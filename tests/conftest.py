"""Shared by all tests: offline, one thread, and the suite's commands as a user types them."""

import copy
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.singleton import Singleton
from tiny import ROOT

# Before torch is imported: no hub, and the same number of threads as the mini scale.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before transformers imports Triton, which reads it as it defines functions

# Where commands that tests start find tasks of the tests (packed.py).
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

# Tests send it to commands, also where the shell that started them has it ignored (a background job).
signal.signal(signal.SIGINT, signal.default_int_handler)

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run a script of the project in the repository's root and return the finished process."""

    def run(*arguments: str, check: bool = True, timeout: int = 600) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def command_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """As `command`, in this process, which saves the seconds of its imports; what a script leaves behind is undone."""
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", list(arguments))
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        handlers, singletons = [signal.getsignal(number) for number in signals], copy.deepcopy(Singleton.get_state())
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(arguments[0], run_name="__main__")
        finally:
            Singleton.set_state(singletons)
            for number, handler in zip(signals, handlers, strict=True):
                signal.signal(number, handler)
        said = capfd.readouterr()
        done = subprocess.CompletedProcess(arguments, int(ended.value.code or 0), said.out, said.err)
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` tests skip, with the reason, where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
