"""Benchmark 4: the suite itself: how much it adds to the training that it does. Scale mini, on the CPU.

python benchmarks/suite.py --quick
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timing
import torch
import yaml

ROOT = timing.HERE.parent
RUN = ["method=mora", "task=uuid", "scale=mini", "r=4", "model.base=null", "logger=none"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def of_length(steps: int) -> list[str]:
    """A run of so many steps, measured at its end."""
    short = ("warmup_steps=2", "decay_steps=2", f"evaluate_at=[{steps}]")
    return [f"training.steps={steps}", *(f"training.{setting}" for setting in short)]


def command(*arguments: str) -> float:
    """Seconds of a command of the suite. Raises CalledProcessError with its output shown."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
        done.check_returncode()
    return seconds


def first_step(out: Path, seed: int) -> float:
    """Seconds from the start of a run to the first loss in its metrics; the run is ended then."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "train.py", *RUN, f"seed={seed}", f"out={out}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None:
            for path in (out / "work").glob("*/metrics.jsonl"):
                if '"loss"' in path.read_text():
                    return time.perf_counter() - start
            time.sleep(0.02)
        raise RuntimeError("the run ended before its first step")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def in_process(out: Path, steps: int) -> dict[str, float]:
    """The parts of a run one by one: data preparation, the Trainer's steps beside a bare loop's, evaluation."""
    from mora_repro.data.preparation import prepare
    from mora_repro.data.task import build_task
    from mora_repro.evaluation import evaluate
    from mora_repro.methods import apply_method, load_base, load_tokenizer
    from mora_repro.results.records import Store
    from mora_repro.spec import RunSpec, compose_config
    from mora_repro.training.train import Collator

    overrides = [*RUN, *of_length(steps)]
    spec = RunSpec.from_config(compose_config(overrides))
    command("train.py", *overrides, f"out={out}")
    record = Store(out).load(spec.id)
    assert record is not None and record.cost is not None
    torch.set_num_threads(spec.training.threads or torch.get_num_threads())
    tokenizer = load_tokenizer(spec)
    task = build_task(spec).for_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as other:
        start = time.perf_counter()
        data = prepare(spec, task, tokenizer, Path(other))
        prepared = time.perf_counter() - start
    model: Any = apply_method(load_base(spec, tokenizer, None), spec, steps).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec.lr)
    collate = Collator(tokenizer.pad_token_id)
    start = time.perf_counter()
    for step in range(steps):
        first = step * spec.training.batch_size
        batch = collate([data[(first + row) % len(data)] for row in range(spec.training.batch_size)])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    bare = time.perf_counter() - start
    start = time.perf_counter()
    scores = evaluate(model.eval(), tokenizer, task.benchmarks(spec.eval), spec.training.max_length, task.mean_of)
    evaluated = time.perf_counter() - start
    return {
        "data preparation, tokens/s": data.tokens / prepared,
        "evaluation, samples/s": max(scores.counts.values()) / evaluated,
        "trainer / bare loop, per step": record.cost.train_s / bare,
        "bare loop, ms per step": 1e3 * bare / steps,
    }


HARNESS = """
import time
import datasets, peft, transformers  # as a run has them by then
from mora_repro.data.task import build_task
from mora_repro.evaluation.measure import fetch
from mora_repro.methods import load_tokenizer
from mora_repro.spec import RunSpec, compose_config
spec = RunSpec.from_config(compose_config(["task=instruct", "scale=mini"]))
benchmarks = build_task(spec).for_tokenizer(load_tokenizer(spec)).benchmarks(spec.eval)
start = time.perf_counter()
fetch(benchmarks)
print(time.perf_counter() - start)
"""


def harness() -> float:
    """Seconds that lm-eval takes in a run until it can ask: its import, and the building of our tasks."""
    done = subprocess.run(
        [sys.executable, "-c", HARNESS], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def tables(out: Path, records: int) -> tuple[float, float]:
    """Seconds from so many records to all tables, and of the command that writes these, the figures and the report."""
    from mora_repro.report.tables import build, markdown
    from mora_repro.report.write import TABLES
    from mora_repro.results.records import Record, Store
    from mora_repro.spec.table import load_table

    template = next(
        record
        for path in sorted((ROOT / "results" / "runs").glob("mini-uuid-*.json"))
        if (record := Record.model_validate_json(path.read_text())).status == "finished" and record.metrics
    )
    store = Store(out)
    cells = load_table("2").cells("mini")
    for cell in cells:
        spec = cell.spec(0)
        for seed in range(records // len(cells)):
            own = spec.model_copy(update={"seed": seed, "task": {**spec.task, "seed": seed}})
            store.save(template.model_copy(update={"spec": own, "id": own.id}))
    whole = command("scripts/report.py", f"out={out}")
    start = time.perf_counter()
    loaded, problems = Store(out).load_all()
    texts = [markdown(build(name, "mini", loaded)) for name in TABLES]
    assert len(loaded) == records and not problems and all(texts)
    return time.perf_counter() - start, whole


def sweep(out: Path, steps: int) -> float:
    """Seconds per cell that a sweep takes beyond its runs' own wall time."""
    from mora_repro.results.records import Store

    out.mkdir(parents=True, exist_ok=True)
    own = out / "own.yaml"
    changed = [*RUN[4:], *of_length(steps)]
    rows = [{"method": "lora", "rank": 4, "overrides": changed}, {"method": "mora", "rank": 4, "overrides": changed}]
    own.write_text(yaml.safe_dump({"name": "own", "title": "own", "task": "uuid", "rows": rows}))
    seconds = command("scripts/sweep.py", f"cells={own}", "scale=mini", "seeds=2", "workers=1", f"out={out}")
    walls = [record.cost.wall_s for record in Store(out).load_all()[0] if record.cost]
    return (seconds - sum(walls)) / len(walls)


def main() -> None:
    chosen = timing.arguments(__doc__ or "")
    rows: dict[str, float] = {}

    def measured(values: dict[str, float]) -> None:
        rows.update(values)
        print(json.dumps(values), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        times = 3 if chosen.quick else 7
        measured({"train.py --help, s": statistics.median(command("train.py", "--help") for _ in range(times))})
        starts = [first_step(out / f"first{number}", number) for number in range(1 if chosen.quick else 3)]
        measured({"from train.py to the first step, s": statistics.median(starts)})
        measured({"lm-eval's start in a run, s": statistics.median(harness() for _ in range(times))})
        measured(in_process(out / "parts", 60 if chosen.quick else 300))
        count = 1000 if chosen.quick else 10_000
        alone, whole = tables(out / "records", count)
        measured({f"{count:,} records to all tables, s": alone})
        measured({f"{count:,} records to tables, figures and report.html, s, as a command": whole})
        if not chosen.quick:
            measured({"sweep beyond its runs, s per cell": sweep(out, 20)})
    text = timing.table([{"what": name, "value": f"{value:.3g}"} for name, value in rows.items()])
    timing.write(chosen.out, "suite", "cpu", text, rows)


if __name__ == "__main__":
    main()
