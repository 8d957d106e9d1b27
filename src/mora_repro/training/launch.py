"""Start the processes of a run on this machine, and see them through.

They get torchrun's variables, but torchrun itself is not used: it kills its workers half a minute after a signal, and
a step of a large model with its checkpoint may take longer.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock

from ..errors import UserError
from ..signals import answered_by
from ..spec import INTERRUPTED, RunSpec

POLL_SECONDS = 0.2
LEAVE_SECONDS = 600  # for the others to end once one is done: rank 0 may still write the weights of a large model
GRACE_SECONDS = 10  # for the others to end once one has failed: most do, as it no longer answers
ERROR_FILE = "MORA_ERROR_FILE"
PARENT = "MORA_PARENT"  # the process that a worker is to end with


def processes_wanted(spec: RunSpec) -> int:
    """How many processes a run has on this machine: as asked, or one per GPU, or one."""
    return spec.trainer.processes or torch.cuda.device_count() or 1


def build_extensions() -> None:
    """Have DeepSpeed's extension for CPUs compiled, once.

    Raises UserError where there is no compiler.
    """
    if torch.cuda.is_available():
        return  # on GPUs, torch's AdamW and NCCL need none
    with _alone_in(folder := _extensions()):
        _compile(folder)


def load_extensions() -> None:
    """Compile the extension where it is missing, and load it into this process, which DeepSpeed then finds there."""
    if torch.cuda.is_available():
        return
    folder = _extensions()
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder  # seconds, not while others wait for the lock

    with _alone_in(folder):
        _compile(folder)
        ShareMemCommBuilder().load(verbose=False)


def _extensions() -> Path:
    """The folder of compiled extensions, which DeepSpeed is told of."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mora-repro"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / f"torch{torch.__version__}")))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within: no other process of ours compiles or loads extensions.

    A process that is killed while it compiles or loads leaves a file `lock` there, on which all others would wait for
    ever. Every process of ours holds a lock of the kernel's meanwhile, which ends with it: what is found is stale.
    """
    with FileLock(folder / "ours.lock"):
        for stale in folder.rglob("lock"):
            stale.unlink()
        yield


def _compile(folder: Path) -> None:
    if not list(folder.rglob("deepspeed_shm_comm*.so")):
        if shutil.which("g++") is None:
            raise UserError(
                "DeepSpeed compiles an extension for CPUs, and there is no g++. On Debian or Ubuntu: "
                "apt-get install g++. Without DeepSpeed: trainer=ddp"
            )
        print("compiling DeepSpeed's extension for CPUs, once: a minute or so ...", file=sys.stderr, flush=True)
        # In a process of its own, since loading it changes this one.
        program = (
            "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Builder; Builder().load(verbose=False)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"DeepSpeed's extension for CPUs could not be compiled:\n{done.stderr[-2000:]}")


def launch(arguments: list[str], processes: int, logs: Path) -> int:
    """Run `python <arguments>` in so many processes; returns 0, INTERRUPTED, or 1 after an error that is shown.

    Rank 0 has this process's stderr, all else goes to `logs/rank-<n>.log`. Signals are passed on. When one fails, all
    end.

    Raises UserError with the error of the process that failed first, where it reported one.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        # Of this launch alone: another command may wait to run the same.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mora-errors-")))
        errors = [folder / f"error-{rank}.json" for rank in range(processes)]
        workers: list[subprocess.Popen[bytes]] = []
        signals = stack.enter_context(_signals_go_to(workers))
        stack.callback(lambda: _end(workers))
        for rank, error in enumerate(errors):
            log = stack.enter_context((logs / f"rank-{rank}.log").open("ab"))
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                ERROR_FILE: error,
                PARENT: os.getpid(),
            }
            workers.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env={"OMP_NUM_THREADS": str(threads)} | os.environ | {k: str(v) for k, v in variables.items()},
                    stdin=subprocess.DEVNULL,
                    stdout=log,  # of libraries; what is for the user goes to stderr
                    stderr=None if rank == 0 else log,
                    start_new_session=True,  # the terminal's ctrl-C comes to this process alone, which passes it on
                )
            )
        statuses = _wait(workers)
        reported = [json.loads(path.read_text()) | {"rank": rank} for rank, path in enumerate(errors) if path.exists()]
    first = min(reported, key=lambda error: error["time"], default=None)
    killed = next((rank for rank, status in enumerate(statuses) if status is not None and status < 0), None)
    if first and first["user_error"]:
        raise UserError(_of(first["rank"], processes) + first["message"])
    if signals:
        return INTERRUPTED
    if killed is not None:  # the errors of others are that it no longer answers
        number = signal.Signals(-cast(int, statuses[killed]))
        why = ", as the kernel does when memory is short" if number == signal.SIGKILL else ""
        raise UserError(
            f"{_of(killed, processes)}ended by {number.name}{why}. The same command goes on from the last checkpoint. "
            f"Logs: {logs}"
        )
    if first:
        print(f"{first['traceback']}error: {_of(first['rank'], processes)}{first['message']}", file=sys.stderr)
        print(f"logs: {logs}", file=sys.stderr)
        return 1
    return max(status or 0 for status in statuses)


def _of(rank: int, processes: int) -> str:
    return f"rank {rank} of {processes}: " if processes > 1 else ""


def report_error(error: BaseException, traceback: str) -> bool:
    """In a worker: leave the error for `launch`, which shows the first; False where `launch` did not start this."""
    if ERROR_FILE not in os.environ:
        return False
    user_error = isinstance(error, UserError)
    message = str(error) if user_error else f"{type(error).__name__}: {error}"
    report = {"time": time.time(), "user_error": user_error, "message": message, "traceback": traceback}
    Path(os.environ[ERROR_FILE]).write_text(json.dumps(report))
    return True


def _wait(workers: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """The exit statuses, once all have ended; after a failure the rest gets a moment, and is ended (None) then."""
    deadline = None
    while None in (statuses := [worker.poll() for worker in workers]):
        if deadline is None and any(status is not None for status in statuses):
            failed = any(status not in (None, 0, INTERRUPTED) for status in statuses)
            deadline = time.monotonic() + (GRACE_SECONDS if failed else LEAVE_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            _end(workers)
            break
        time.sleep(POLL_SECONDS)
    return statuses


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
    for worker in workers:
        worker.wait()


@contextmanager
def _signals_go_to(workers: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Within: SIGINT, SIGTERM and SIGUSR1 are for the workers, which save and end; yields those that came."""
    came: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        came.append(number)
        if came.count(signal.SIGINT) > 2:
            _end(workers)  # whatever they are at
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    with answered_by(pass_on, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        yield came
