"""Where a run runs, for its record."""

from __future__ import annotations

import os
import platform
import resource
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
import torch

from ..checkout import git
from ..distributed import size
from .records import Environment

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "lm-eval",
    "hydra-core",
    "mora-repro",
)


def describe_environment(precision: Literal["fp32", "bf16"]) -> Environment:
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return Environment(
        git_commit=commit,
        git_dirty=None if commit is None else bool(changes),
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        cpu=processor(),
        cores=os.cpu_count() or 1,
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        processes=size(),
        precision=precision,
        gpus=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    )


def peak_memory_mb() -> float:
    """Peak memory of this process in MB: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
