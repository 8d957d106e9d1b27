"""Run by test_trainers.py in one or more processes: many runs one after the other, which spares their start-up.

python many_runs.py <plan.json>: a list of {overrides, out} and, for runs that go on from another's checkpoints,
{after, step}. Checkpoints of finished runs stay.
"""

import gc
import json
import os
import shutil
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from mora_repro import distributed
from mora_repro.results.records import Store
from mora_repro.run import _run
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.options import Options
from mora_repro.training import load_extensions


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    first = RunSpec.from_config(compose_config(plan[0]["overrides"]))
    if distributed.size() > 1 or first.trainer.stage:
        if first.trainer.stage:
            load_extensions()
        distributed.join(deepspeed=first.trainer.stage > 0)
    for run in plan:
        spec = RunSpec.from_config(compose_config(run["overrides"]))
        store = Store(run["out"])
        work = store.work(spec.id)
        if distributed.is_main():
            work.mkdir(parents=True)
            if "after" in run:
                copy_checkpoints(Store(run["after"]).work(spec.id), work, run["step"])
        distributed.barrier()
        AcceleratorState._reset_state()
        gc.collect()
        _run(spec, store, work, Options(out=run["out"], keep_checkpoints=100), save=True)
    distributed.leave()


def copy_checkpoints(source: Path, work: Path, step: int) -> None:
    """Those up to a step, and a torn one of the next, as a kill in the middle of a save would leave it."""
    for path in (source / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) <= step:
            shutil.copytree(path, work / "checkpoints" / path.name)
    torn = work / "checkpoints" / f"checkpoint-{step + 1}"
    shutil.copytree(source / "checkpoints" / torn.name, torn)
    largest = max((path for path in torn.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
