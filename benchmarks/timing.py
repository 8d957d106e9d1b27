"""Shared by the benchmarks: interleaved timing, memory, and the files that a benchmark writes.

What is compared runs in one process, in turns and in random order, so that other load on the machine meets all alike.
Ratios are taken within a turn; shown are their median and quartiles.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler's own lines

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from mora_repro.results.environment import processor

HERE = Path(__file__).parent
Steps = dict[str, Callable[[], Any]]


def arguments(description: str) -> argparse.Namespace:
    """The options that all benchmarks have; sets the number of threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases, about a minute")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the tables' folder (default: %(default)s)")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device here")
        raise SystemExit(0)
    torch.set_num_threads(chosen.threads)
    _keep_freed_memory()
    return chosen


def _keep_freed_memory() -> None:
    """By itself glibc gives memory back and takes it anew, at moments that depend on what ran before.

    The kernel then fills it with zeros, which is up to a tenth of a layer's step, and not of its doing.
    """
    m_trim_threshold, m_mmap_threshold, largest = -1, -3, 32 << 20
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_threshold, largest)


def machine(device: str) -> dict[str, str]:
    """What the numbers were measured on."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        amx = ", AMX" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else ""
        name = f"{processor()}{amx}, {torch.get_num_threads()} thread(s)"
    import peft

    return {
        "processor": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(steps: Steps, device: str, turns: int, seconds: float = float("inf")) -> dict[str, list[float]]:
    """Seconds of each step in each turn, after two turns that don't count.

    On one CPU thread these are of the process's own time, which leaves out when another program had the core.

    Args:
        turns: how many at most.
        seconds: no further turn begins after so long; there are at least five.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begin = time.perf_counter()
    for turn in range(turns + 2):
        if turn >= 7 and time.perf_counter() - begin > seconds:
            break
        random.shuffle(order)
        for name in order:
            synchronize(device)
            start = clock()
            steps[name]()
            synchronize(device)
            if turn >= 2:
                times[name].append(clock() - start)
    return times


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def ratio(times: dict[str, list[float]], name: str, to: str) -> tuple[float, float, float]:
    """Quartiles of the ratio within a turn."""
    return quartiles(one / other for one, other in zip(times[name], times[to], strict=True))


def shown(of: tuple[float, float, float]) -> str:
    """median (first quartile-third quartile)."""
    return f"{of[1]:.2f} ({of[0]:.2f}-{of[2]:.2f})"


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most memory that a step held at once beyond what was held before it."""
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def gpu_seconds(step: Callable[[], Any], times: int = 5) -> float:
    """What a GPU computes in a step, as the sum over its kernels: no waiting for the CPU that launches them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) * 1e-6 / times


def saved_bytes(forward: Callable[[], Any], module: nn.Module) -> int:
    """Bytes kept for the backward pass, each storage once, the module's own weights and buffers not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own function keeps would never be freed

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # alive until counted, so that no address is used twice
    total = sum(storages.values())
    del kept
    return total


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def write(out: Path, name: str, device: str, text: str, data: Any) -> None:
    """NAME-DEVICE.md and .json; the text is printed as well."""
    out.mkdir(parents=True, exist_ok=True)
    on = machine(device)
    head = ", ".join([on["processor"], *(f"{key} {on[key]}" for key in ("python", "torch", "peft"))])
    text = f"{head}\n\n{text}\n"
    (out / f"{name}-{device}.md").write_text(text)
    (out / f"{name}-{device}.json").write_text(json.dumps({"machine": on, "results": data}, indent=1) + "\n")
    print(text)
