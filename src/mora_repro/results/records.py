"""Run records: one JSON file per run, `<out>/runs/<id>.json`. Tables are computed from these alone."""

from __future__ import annotations

import errno
import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..disk import write_atomically
from ..errors import UserError
from ..spec import RunSpec

MetricValue = float | int
LOWER_IS_BETTER = ("perplexity",)
SINGULAR_VALUES = "singular_values"  # the metric of a `Spectrum`


def higher_is_better(metric: str) -> bool:
    return metric not in LOWER_IS_BETTER


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Environment(Part):
    """Where a run ran; `packages` maps names to versions, memory is in GB (10^9 bytes), cores and GPUs are those of the
    machine of rank 0."""

    git_commit: str | None
    git_dirty: bool | None
    python: str
    packages: dict[str, str]
    cpu: str
    cores: int
    memory_gb: float
    gpus: list[str]
    processes: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"


class Data(Part):
    """What a run was trained on; `overlap` counts samples with a text of a benchmark, None where none was looked for.

    `base` is the run that made its base model, `base_sha256` its weights.
    """

    fingerprint: str
    examples: int
    tokens: int
    truncated: int
    dropped: int
    skipped: int = 0
    overlap: int | None = None
    base: str | None
    base_sha256: str | None


class Parameters(Part):
    trainable: int
    total: int


class Curve(Part):
    """Training loss and learning rate by optimizer step, in columns of equal length."""

    step: list[int]
    loss: list[float]
    lr: list[float]


class Evaluation(Part):
    """Metrics at a step, with standard errors and numbers of samples; the first records have neither."""

    step: int
    metrics: dict[str, MetricValue]
    stderr: dict[str, float] = {}
    counts: dict[str, int] = {}


class Cost(Part):
    """Wall time of the whole process and of training alone (s); peak resident or device memory (MB)."""

    wall_s: float
    train_s: float
    tokens_per_s: float
    peak_memory_mb: float


class Spectrum(Part):
    """How many singular values of a run's weight update are above `threshold`: by kind of linear layer ('q_proj'), a
    number per layer. The metric `singular_values` is their mean. `scripts/spectrum.py` adds it to a record.
    """

    threshold: float
    above: dict[str, list[int]]


class Record(Part):
    """A run's outcome. A finished run has every field; a failed one its `error`; a diverged one failed by its loss."""

    schema_version: Literal[1] = 1
    id: str
    status: Literal["finished", "failed", "diverged", "interrupted"]
    error: str | None = None
    spec: RunSpec
    command: str
    started: str
    environment: Environment
    data: Data | None = None
    parameters: Parameters | None = None
    curve: Curve | None = None
    evaluations: list[Evaluation] = []
    metrics: dict[str, MetricValue] = {}
    cost: Cost | None = None
    spectrum: Spectrum | None = None


def _lies_below(path: str | bytes, folder: Path) -> bool:
    """Whether a path is in a folder, or is one that the folder should be in."""
    place, root = Path(os.fsdecode(path)).absolute(), folder.absolute()
    return place.is_relative_to(root) or root.is_relative_to(place)


def _in_words(differences: dict[str, object]) -> str:
    """The other's values, of four keys at most; the parts of a trainer follow from its name."""
    shown = [
        f"{key}={was}"
        for key, was in differences.items()
        if not key.startswith(("trainer.deepspeed", "trainer.stage", "trainer.offload"))
    ]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def write_samples(record: Path, samples: list[dict[str, Any]]) -> Path:
    """Write a line per sample beside a record; returns the file."""
    path = record.with_suffix(".samples.jsonl.gz")
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(path, gzip.compress(lines.encode(), mtime=0))  # the same bytes again
    return path


def read_samples(record: Path) -> list[dict[str, Any]]:
    """The samples beside a record."""
    lines = gzip.decompress(record.with_suffix(".samples.jsonl.gz").read_bytes()).decode().split("\n")[:-1]
    return [json.loads(line) for line in lines]


class Store:
    """The output folder of runs: `runs/` holds records, `work/` checkpoints, logs and trained weights."""

    def __init__(self, out: str | Path):
        """Raises UserError for an empty name, which a shell variable that is not set leaves."""
        if not str(out or ""):
            raise UserError("out= is empty: name a folder, or leave it out for out=results")
        self.out = Path(out)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within: where the output folder can't be written, a UserError says so."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            path = getattr(error, "filename", None)
            if path is not None and not _lies_below(path, self.out):
                raise
            # safetensors and torch have exceptions of their own for a full disk.
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
                raise UserError(
                    f"the disk of out={self.out} is full. Make room and start again: the run goes on from its "
                    f"last whole checkpoint. Or choose another folder: out=<folder>"
                ) from error
            if path is None:
                raise
            raise UserError(
                f"out={self.out} can't be written ({error}). Choose a folder that can: out=<folder>"
            ) from error

    def record_path(self, run_id: str) -> Path:
        return self.out / "runs" / f"{run_id}.json"

    def work(self, run_id: str) -> Path:
        """The run's working folder: spec.json, metrics.jsonl, checkpoints/, model/."""
        return self.out / "work" / run_id

    def interrupted_like(self, spec: RunSpec) -> list[str]:
        """In what other runs of the same method, rank, task, scale, seed and model differ that were interrupted."""
        alike = (self.out / "work").glob(f"{spec.id.rpartition('-')[0]}-*/spec.json")
        found = []
        for path in sorted(path for path in alike if any((path.parent / "checkpoints").glob("checkpoint-*"))):
            with suppress(ValidationError):
                found.append(RunSpec.model_validate_json(path.read_text()))
        others = [other for other in found if other.id != spec.id and other.model == spec.model]
        return [_in_words(spec.differences(other)) for other in others]

    def save(self, record: Record) -> Path:
        path = self.record_path(record.id)
        write_atomically(path, record.model_dump_json(indent=1) + "\n")
        return path

    def save_samples(self, run_id: str, samples: list[dict[str, Any]]) -> Path:
        """Write what the last evaluation asked and got, a line per sample, beside the record."""
        return write_samples(self.record_path(run_id), samples)

    def load(self, run_id: str) -> Record | None:
        """The record of a run, or None where there is none or it can't be read."""
        try:
            return Record.model_validate_json(self.record_path(run_id).read_text())
        except (FileNotFoundError, ValidationError):
            return None

    def finished(self, run_id: str) -> Record | None:
        """The record of a run if it finished."""
        record = self.load(run_id)
        return record if record and record.status == "finished" else None

    def load_all(self) -> tuple[list[Record], list[str]]:
        """All records, and a line for each file that is none (never left out silently)."""
        records, problems = [], []
        for path in sorted((self.out / "runs").glob("*.json")):
            try:
                records.append(Record.model_validate_json(path.read_text()))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                problems.append(f"{path}: no valid record ({where}: {first['msg']}); left out")
        return records, problems
