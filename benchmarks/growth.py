"""Benchmark 5: how a training step grows with the model and the rank, and the report with the records.

Shown is the exponent of a power law fitted to medians, beside what the arithmetic says. Small sizes grow less than
that, since what does not depend on them weighs more.

    python benchmarks/growth.py --quick
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timing
from step import Case, measure
from suite import tables

PLAIN = {"width": 512, "inner": 1376, "layers": 2, "batch": 1, "length": 512, "r": 8, "dtype": "fp32"}
# What grows, its values, and the expected exponents of time and of peak memory.
GROWTH: dict[str, tuple[Sequence[int], str, str]] = {
    "width": ((256, 512, 1024, 2048), "2 (products); less while attention weighs", "1 (activations)"),
    "layers": ((1, 2, 4, 8), "1", "1"),
    "length": ((128, 256, 512, 1024), "1; up to 2 where attention weighs", "1; up to 2"),
    "r": ((4, 8, 16, 32, 64), "near 0: the base's products weigh most", "near 0"),
}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    chosen = timing.arguments(__doc__ or "")
    methods = ("LoRA", "sharing", "rotation")
    rows: list[dict[str, Any]] = []
    data: dict[str, Any] = {}
    for what, (sizes, time_expected, memory_expected) in GROWTH.items():
        sizes = sizes[:3] if chosen.quick else sizes
        results = []
        for size in sizes:
            changed = {what: size, "inner": size * 43 // 16} if what == "width" else {what: size}
            results.append(measure(Case(**{**PLAIN, **changed}), chosen.device, methods, 7, 10))
        data[what] = dict(zip(map(str, sizes), results, strict=True))
        for name in (*methods, "base"):
            rows.append(
                {
                    "grows": f"{what}, {sizes[0]} to {sizes[-1]}",
                    "method": name,
                    "time": f"{exponent(sizes, [result[name]['milliseconds'] for result in results]):.2f}",
                    "expected": time_expected,
                    "peak memory": f"{exponent(sizes, [result[name]['peak_bytes'] for result in results]):.2f}",
                    "expected ": memory_expected,
                }
            )
            print(*rows[-1].values(), sep=" | ", flush=True)
    if chosen.device == "cpu":
        counts = (500, 1000, 2000) if chosen.quick else (1000, 3000, 10_000)
        with tempfile.TemporaryDirectory() as temporary:
            seconds = [tables(Path(temporary) / str(count), count)[1] for count in counts]
        data["records"] = dict(zip(map(str, counts), seconds, strict=True))
        rows.append(
            {
                "grows": f"records, {counts[0]} to {counts[-1]}",
                "method": "report",
                "time": f"{exponent(counts, seconds):.2f}",
                "expected": "1; less while the start weighs",
            }
        )
    timing.write(chosen.out, "growth", chosen.device, timing.table(rows), data)


if __name__ == "__main__":
    main()
