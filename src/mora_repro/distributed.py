"""The processes of one run: who this one is, and what they tell each other; and how other commands are waited for.

The environment says it, in the variables of torchrun and DeepSpeed's launcher (RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR, MASTER_PORT), or in those of Slurm's srun. A process that is alone needs none of this: every function
works there too.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from .signals import wait_to_be_ended

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# For what may take long on one process alone, such as the training of a base.
PATIENCE = timedelta(days=7)

_control: dist.ProcessGroup | None = None


def started_by_a_launcher() -> bool:
    """Whether this process is one of a group that torchrun, srun or DeepSpeed's launcher started.

    srun's variables are turned into torchrun's; its first node is where the processes meet.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    # A batch script has SLURM_NTASKS too; only the tasks that srun starts have a step and more than one of them.
    if "SLURM_STEP_ID" not in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return False
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])  # such as 2(x3),1
    per_node = [int(tasks) for tasks, nodes in counts for _ in range(int(nodes or 1))]
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node[int(os.environ["SLURM_NODEID"])])
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _address_of_first(os.environ["SLURM_STEP_NODELIST"])
    port = 20_000 + (int(os.environ["SLURM_JOB_ID"]) * 16 + int(os.environ["SLURM_STEP_ID"]) % 16) % 40_000
    os.environ.setdefault("MASTER_PORT", str(port))
    return True


def _address_of_first(nodes: str) -> str:
    """Where the first of Slurm's nodes is reached: by its name where that resolves, else as Slurm does."""

    def scontrol(*arguments: str) -> str:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout

    first = scontrol("show", "hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(first, None)
    except OSError:
        found = re.search(r"NodeAddr=(\S+)", scontrol("show", "node", first))
        return found.group(1) if found else first
    return first


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes."""
    return rank() == 0


def join(deepspeed: bool) -> None:
    """Meet the other processes; from here on they can talk, through DeepSpeed too where it is used."""
    global _control
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend)
    if deepspeed:
        from deepspeed import init_distributed

        init_distributed(backend, verbose=False)
    # Of the CPU, so that a word between processes does not wait for the GPU's queue.
    _control = dist.new_group(backend="gloo", timeout=PATIENCE)


def leave() -> None:
    """Take leave of the others, who have come as far."""
    global _control
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
    _control = None


def barrier() -> None:
    """Wait for all."""
    if _control:
        dist.barrier(_control)


def from_main(value: Any) -> Any:
    """What rank 0 has; the others' value is not looked at."""
    if not _control:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, _control)
    return values[0]


def gather(value: Any) -> list[Any]:
    """What every process has, by rank."""
    if not _control:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value, _control)
    return values


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if not _control:
        return flag
    one = torch.tensor(int(flag))
    dist.all_reduce(one, dist.ReduceOp.MAX, _control)
    return bool(one)


def first_to_fail() -> bool:
    """Whether no other process has asked this before: the one whose error is the cause, and is shown."""
    if not dist.is_initialized():
        # Before they met, all do the same, and fail alike; one that nobody ends has failed alone.
        return is_main() or not wait_to_be_ended()
    with suppress(Exception):  # the process that keeps the count may be gone: then it has failed before
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    return False


def say(text: str) -> None:
    """A line for the user, of rank 0 alone. That nobody reads it any more ends no run."""
    if is_main():
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


@contextmanager
def alone_with(path: Path, other: str) -> Iterator[None]:
    """Hold the lock file `path`; where another command holds it, wait, and say that `other` is what it does."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{other}; waiting for it to end ...")
        lock.acquire()
    with lock:
        yield
