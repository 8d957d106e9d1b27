"""Processes that tests start, wait for and look at."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def launcher(processes: int) -> list[str]:
    """Python's arguments that have torchrun start so many of what follows."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def alone(port: int, *paths: Path) -> dict[str, str]:
    """The environment of a process that is its own group on a CPU, as DeepSpeed wants it; it also imports from `paths`.

    The port is the first of 200, so that tests at the same time take each their own.
    """
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *sys.path]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port + os.getpid() % 200),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def until(reached: Callable[[], object], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def children_of(process: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def is_running(process: int) -> bool:
    """Whether a process is there and not merely waiting for its parent to look at it; it gets a moment to end."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] == "Z":
                return False
        except OSError:
            return False
        time.sleep(0.1)
    return True
