"""The files of a job: sbatch's script from the templates in slurm/, its elements' runs, and what each trainer gets."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..disk import write_atomically
from ..errors import UserError
from ..results.records import Store
from ..spec import RunSpec, compose_config
from ..spec.compose import ROOT
from ..spec.options import Options, RunFile
from .manifest import Batch, Manifest, as_override
from .profile import Shape, shape_of

SMALL_GB = 8  # are enough for a job that chooses or writes the report


def script(batch: Batch, manifest: Manifest) -> str:
    """What sbatch is given."""
    environment = Environment(
        loader=FileSystemLoader(ROOT / "slurm"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="<%#",  # {# is bash's
        comment_end_string="#%>",
    )
    environment.filters["quoted"] = lambda value: shlex.quote(str(value))
    specs = [manifest.runs[run].spec for run in batch.runs]
    profile = manifest.profile
    shape = shape_of(specs[0], profile) if specs else Shape(minutes=60, processes=1)
    options = _sbatch_options(batch, manifest, shape)
    return environment.get_template(f"{batch.stage}.sh.j2").render(
        options=[f"{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
        + ["--requeue", *(shlex.quote(option) for option in profile.sbatch)],
        sweep=manifest.path,
        out=manifest.out,
        folder=manifest.folder,
        profile=profile,
        python=[*profile.container, profile.python or manifest.python],
        name=batch.name,
        shape=shape,
        deepspeed=any(spec.trainer.stage for spec in specs),
        check=profile.offline and any(needs_the_hub(spec) for spec in specs),
        retry=manifest.command("retry=true"),
        tables=bool(manifest.sweep.tables),
        report=ROOT / "scripts" / "report.py",
        out_override=as_override("out", manifest.out),
    )


def _sbatch_options(batch: Batch, manifest: Manifest, shape: Shape) -> dict[str, Any]:
    profile = manifest.profile
    training = batch.stage == "train"
    per_node = (shape.processes or 1) * shape.packed
    gpu = f"gpu:{profile.gpu_type}" if profile.gpu_type else "gpu"
    at_once = f"%{profile.at_once}" if profile.at_once else ""
    memory = profile.memory_gb
    if memory:
        memory = memory * per_node if training else min(memory, SMALL_GB)
    log = str(manifest.path / "logs" / batch.name).replace("%", "%%")
    return {
        "--job-name": f"{manifest.key}-{batch.name}",
        "--array": f"0-{len(batch.elements) - 1}{at_once}" if training else None,
        "--output": f"{log}{'-%a' if training else ''}.log",
        "--open-mode": "append",
        "--partition": profile.partition if training else profile.small_partition or profile.partition,
        "--account": profile.account,
        "--qos": profile.qos,
        "--nodes": shape.nodes,
        "--ntasks-per-node": shape.packed,
        "--cpus-per-task": profile.cpus_per_process * (shape.processes or 1) if training else 1,
        "--gres": f"{gpu}:{per_node}" if training and profile.gpus_per_node else None,
        "--mem": f"{memory * 1024:.0f}M" if memory else None,
        "--time": shape.minutes,
        "--signal": f"B:USR1@{profile.signal_seconds}" if training else None,
    }


def lines_of(batch: Batch, manifest: Manifest) -> str:
    """A line per element: its runs and, behind a colon, the bases that they may train first."""
    lines = []
    for element in batch.elements:
        bases = {base for run in element if (base := manifest.runs[run].spec.model.base_id)}
        lines.append(f"{' '.join(element)}:{' '.join(sorted(bases))}\n")
    return "".join(lines)


def write_run_file(run_id: str, manifest: Manifest) -> Path:
    """What the trainer gets; returns the file."""
    run = manifest.runs[run_id]
    kept = tuple(text for text in run.overrides if text.startswith(("logger", "trainer.keep_checkpoints")))
    options = _options(kept).model_copy(update={"out": manifest.out, "overrides": run.overrides})
    path = manifest.path / "runs" / f"{run_id}.json"
    write_atomically(path, RunFile(spec=run.spec, options=options).model_dump_json() + "\n")
    return path


@cache
def _options(overrides: tuple[str, ...]) -> Options:
    return Options.from_config(compose_config(list(overrides)), [])


def needs_the_hub(spec: RunSpec) -> bool:
    """Whether a run reads a model or data that the suite does not make itself."""
    return spec.model.pretrained is not None or spec.task.get("data", "generated") != "generated"


def check(files: Sequence[str]) -> int:
    """Look, without a network, whether all is there that the runs need.

    Raises UserError with the commands that prepare it.
    """
    from ..prepare import missing  # takes seconds

    why, commands = [], []
    for path in files:
        job = RunFile.load(Path(path))
        if needs_the_hub(job.spec) and (lack := missing(job.spec, Store(job.options.out))):
            why.append(f"{job.spec.id}: {lack}")
            words = ["python", "scripts/prepare.py", *job.options.overrides, as_override("out", job.options.out)]
            commands.append(shlex.join(words))
    if why:
        raise UserError(
            f"{len(why)} of {len(files)} runs lack what they need. {why[0]}\n"
            "Where there is internet, such as on the login node:\n" + "\n".join(commands)
        )
    return 0
