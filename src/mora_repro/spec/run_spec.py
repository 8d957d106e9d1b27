"""RunSpec: everything that decides a run's result, validated; its hash is the run's identity."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ..errors import UserError
from .compose import RUN, compose_config, explain, find_row

# Keys of a configuration that do not change what a run computes.
OUTSIDE_IDENTITY = ("out", "rerun")


class Strict(BaseModel):
    """Immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Method(Strict):
    """What is trained. `peft` is a PEFT config as Hydra's `_target_` and arguments; None: all weights."""

    name: str
    title: str
    source: str
    recipe: str
    ranked: bool
    peft: dict[str, Any] | None


class Model(Strict):
    """The base model: `pretrained` (hub id or folder), or made from `architecture`.

    `base` is the task on which a model made from scratch is trained first, and `base_id` that run.
    """

    name: str
    title: str
    pretrained: str | None
    revision: str | None
    tokenizer: str | None
    base: str | None
    base_id: str | None = None
    architecture: dict[str, Any] | None


class Training(Strict):
    """How it is trained; `batch_size` is global, in samples; lengths are in tokens."""

    steps: PositiveInt | None
    epochs: PositiveFloat | None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    max_length: PositiveInt
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"]
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt | None
    weight_decay: float
    evaluate_at: tuple[PositiveInt, ...]
    save_every: PositiveInt
    log_every: PositiveInt
    threads: PositiveInt | None

    @model_validator(mode="after")
    def _check(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of training.steps and training.epochs, the other null")
        if (self.decay_steps is not None) != (self.schedule == "warmup_stable_decay"):
            raise ValueError("training.decay_steps belongs to training.schedule=warmup_stable_decay, and only to it")
        if self.steps is not None and self.warmup_steps + (self.decay_steps or 0) > self.steps:
            raise ValueError(
                f"training.steps={self.steps} is less than training.warmup_steps={self.warmup_steps} and "
                f"training.decay_steps={self.decay_steps} together; lower those too"
            )
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(
                f"training.batch_size={self.batch_size} is no multiple of "
                f"training.micro_batch_size={self.micro_batch_size}"
            )
        return self


class RunSpec(Strict):
    """One run. Made by `from_config`; two runs with the same `id` give the same numbers."""

    scale: Literal["mini", "paper"]
    method: Method
    task: dict[str, Any]
    model: Model
    r: PositiveInt | None
    lr: PositiveFloat
    seed: NonNegativeInt
    training: Training
    content: dict[str, str] = {}  # sha256 of local folders that the run reads, by key

    @classmethod
    def from_config(cls, config: DictConfig) -> RunSpec:
        """Validate a composed configuration.

        Raises UserError: a value of the wrong kind, a rank for a method that has none, a missing value.
        """
        try:
            values: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            raise explain(error, [], RUN) from error
        values["scale"] = values["scale"]["name"]
        for name in OUTSIDE_IDENTITY:
            del values[name]
        values["content"] = _contents(values)
        try:
            spec = cls.model_validate(values)
        except ValidationError as error:
            raise UserError(describe(error)) from error
        if spec.method.ranked and spec.r is None:
            raise UserError(f"method={spec.method.name} needs a rank: r=8, say.")
        if not spec.method.ranked and spec.r is not None:
            raise UserError(
                f"method={spec.method.name} has no rank, so r={spec.r} can't be: leave r out, or choose "
                f"a method that has one: python train.py method=lora r={spec.r}"
            )
        if spec.model.base:
            base = spec.base_spec()
            spec = spec.model_copy(update={"model": spec.model.model_copy(update={"base_id": base.id})})
        return spec

    def base_spec(self) -> RunSpec:
        """The run that trains this run's base: the same model from scratch, on the task `model.base`."""
        overrides = ["method=fft", f"task={self.model.base}", f"scale={self.scale}", "model=mini"]
        base = RunSpec.from_config(compose_config(overrides))
        model = self.model.model_copy(update={"base": None, "base_id": None})
        return base.model_copy(update={"model": model})

    @property
    def name(self) -> str:
        """The method's title and the rank: 'LoRA r=8', 'FFT'."""
        return self.method.title if self.r is None else f"{self.method.title} r={self.r}"

    @property
    def id(self) -> str:
        """`<scale>-<task>-<method>[-r<rank>]-s<seed>-<hash>`; the hash covers all but titles and sources."""
        values = self.model_dump(mode="json")
        for part in (values["method"], values["model"], values["task"]):
            part.pop("title", None)
            part.pop("source", None)
        if not self.content:
            del values["content"]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:10]
        rank = "" if self.r is None else f"-r{self.r}"
        return f"{self.scale}-{self.task['name']}-{self.method.name}{rank}-s{self.seed}-{digest}"

    def notices(self) -> list[str]:
        """What the user should know of a valid spec: so far, a recipe taken from another rank."""
        row = find_row(self.scale, self.task["name"], self.method.recipe, self.r)
        if self.r is not None and row.get("r", self.r) != self.r:
            return [
                f"no recipe for r={self.r} at scale={self.scale}: taking that of r={row['r']} "
                f"(conf/recipes/{self.scale}.yaml); lr={self.lr:g}"
            ]
        return []


def _contents(values: dict[str, Any]) -> dict[str, str]:
    """sha256 of the local folders that a configuration names, so that another content is another run."""
    named = {"task.data": values["task"].get("data")}
    named |= {f"model.{key}": values["model"].get(key) for key in ("pretrained", "tokenizer")}
    return {key: _folder_sha256(Path(path)) for key, path in named.items() if path and Path(path).is_dir()}


@cache
def _folder_sha256(folder: Path) -> str:
    """Of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def describe(error: ValidationError, script: str = "train.py") -> str:
    """One line per wrong value: its key, the value, what is wanted."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        problem = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list, such as [75,300]")
        shown = f"{key}={item['input']!r}: " if not isinstance(item["input"], dict) else (f"{key}: " if key else "")
        lines.append(shown + problem[0].lower() + problem[1:])
    return "\n       ".join(lines) + f". See it whole: python {script} --cfg job --resolve"
