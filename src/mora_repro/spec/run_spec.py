"""RunSpec: everything that decides a run's result, validated; its hash is the run's identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from ..errors import UserError
from .compose import CONF, RUN, compose_config, explain, find_row
from .secrets import refuse_secrets

# Keys of a configuration that do not change what a run computes; Options has them.
OUTSIDE_IDENTITY = ("out", "rerun", "plan", "machine", "logger", "trainer.keep_checkpoints")

# Keys whose value may be a file or folder; so may those of eval.data.
NAMING_FILES = ("task.data", "task.general", "model.pretrained", "model.tokenizer")

# Keys of tasks that came after records were made, with the value that changes nothing: a task's keys are its own
# module's, so that their defaults are not known here.
LATER_TASK_KEYS: dict[str, Any] = {
    "columns": {"question": "question", "answer": "answer"},  # of gsm8k
    "on_bad_row": "stop",
    "overlapping": "drop",
    "math": None,  # of gsm8k
}

Grouping = Literal["strided", "blocked"]  # as mora.operators.Grouping, whose import takes seconds


class Strict(BaseModel):
    """Immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Config = TypeVar("Config", bound=Strict)


class Merge(Strict):
    """A schedule of merging the adapter into the base and starting it anew (ReLoRA, ReMoRA, PeriodicLoRA).

    `every` and `restart_warmup` are in optimizer steps; after a merge the rate climbs from zero to the schedule's in
    `restart_warmup` steps. `groupings` are sharing's (input, output) groupings, taken in turn. With `momentum` m, what
    is merged is m times what was merged last plus 1 - m times the adapter. `fp32_master` keeps the merged weights in
    fp32 on the CPU where the base has fewer bits, so that merges do not round.
    """

    every: PositiveInt
    restart_warmup: NonNegativeInt
    groupings: tuple[tuple[Grouping, Grouping], ...] = ()
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    fp32_master: bool = False

    @model_validator(mode="after")
    def _check(self) -> Merge:
        if self.restart_warmup >= self.every:
            raise ValueError(
                f"method.merge.restart_warmup={self.restart_warmup} must be less than method.merge.every={self.every}"
            )
        return self


class Method(Strict):
    """What is trained. `peft` is a PEFT config as Hydra's `_target_` and arguments; None: all weights.

    `lr_factors` multiply the rate of the parameters whose name contains the key (LoRA+); `frozen` and `orthogonal`
    are parts of names of adapter parameters that are not trained, and that start as a random orthogonal matrix
    (AsyLoRA). `cannot` says by trainer why the method can't run under it.
    """

    name: str
    title: str
    source: str
    recipe: str
    ranked: bool
    peft: dict[str, Any] | None
    merge: Merge | None = None
    lr_factors: dict[str, PositiveFloat] = {}
    frozen: tuple[str, ...] = ()
    orthogonal: tuple[str, ...] = ()
    cannot: dict[str, str] = {}


class Model(Strict):
    """The base model: `pretrained` (hub id, folder or GGUF file), or made from `architecture`. With
    `trust_remote_code`, code that comes with a model from the hub is run.

    `base` is the task on which a model made from scratch is trained first, and `base_id` that run.
    """

    name: str
    title: str
    pretrained: str | None
    revision: str | None
    tokenizer: str | None
    base: str | None
    base_id: str | None = None
    trust_remote_code: bool = False
    architecture: dict[str, Any] | None


class Training(Strict):
    """How it is trained; `batch_size` is global, in samples; lengths are in tokens. `group_by_length`: a step's samples
    have about the same length.

    `also_trained` are names of modules (the ends of them, as PEFT's `modules_to_save`) that are trained whole beside an
    adapter, at `also_trained_lr_factor` times the rate.
    """

    steps: PositiveInt | None
    epochs: PositiveFloat | None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    max_length: PositiveInt
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"]
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt | None
    weight_decay: float
    also_trained: tuple[str, ...] = ()
    also_trained_lr_factor: PositiveFloat = 1.0
    evaluate_at: tuple[PositiveInt, ...]
    save_every: PositiveInt
    log_every: PositiveInt
    threads: PositiveInt | None
    group_by_length: bool = False

    @model_validator(mode="after")
    def _check(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of training.steps and training.epochs, the other null")
        if (self.decay_steps is not None) != (self.schedule == "warmup_stable_decay"):
            raise ValueError("training.decay_steps belongs to training.schedule=warmup_stable_decay, and only to it")
        if self.steps is not None and self.warmup_steps + (self.decay_steps or 0) > self.steps:
            warmup = f"training.warmup_steps={self.warmup_steps}"
            decay = f" and training.decay_steps={self.decay_steps} together" if self.decay_steps else ""
            lower = f"training.warmup_steps={self.steps // 10}"
            if self.decay_steps:
                lower += f" training.decay_steps={max(1, self.steps // 2)}"
            raise ValueError(f"training.steps={self.steps} is less than {warmup}{decay}. Lower those too: {lower}")
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(
                f"training.batch_size={self.batch_size} is no multiple of "
                f"training.micro_batch_size={self.micro_batch_size}"
            )
        return self


class Trainer(Strict):
    """How it is distributed. `processes` None: one per local GPU, or one; `stage` is ZeRO's; `deepspeed` its JSON."""

    name: str = "plain"
    processes: PositiveInt | None = 1
    stage: Literal[0, 1, 2, 3] = 0
    offload: bool = False
    precision: Literal["fp32", "bf16"] | None = None
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "flash_attention_2", "eager"] | None = None
    deepspeed: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Trainer:
        if self.stage != ((self.deepspeed or {}).get("zero_optimization") or {}).get("stage", 0):
            raise ValueError(f"trainer.stage={self.stage} comes with the trainer: choose trainer=zero{self.stage or 1}")
        return self


class Eval(Strict):
    """How it is measured. `data` has local files or folders by benchmark, in place of those of the hub; `split` is what
    is asked: the test set, or the validation set, by which rates are chosen; `limit` bounds the samples of each."""

    split: Literal["test", "validation"] = "test"
    limit: PositiveInt | None = None
    data: dict[str, str] = {}

    @field_validator("data", mode="before")
    @classmethod
    def _leave_out_what_is_not_given(cls, data: dict[str, str | None]) -> dict[str, str]:
        return {name: path for name, path in data.items() if path is not None}


class RunSpec(Strict):
    """One run. Made by `from_config`; on the same machine, two runs with the same `id` give the same numbers."""

    scale: Literal["mini", "paper"]
    method: Method
    task: dict[str, Any]
    model: Model
    r: PositiveInt | None
    lr: PositiveFloat
    seed: NonNegativeInt
    training: Training
    trainer: Trainer = Trainer()
    eval: Eval = Eval()
    content: dict[str, str] = {}  # sha256 of local files and folders that the run reads, by key

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
        for key in OUTSIDE_IDENTITY:
            *parents, last = key.split(".")
            del reduce(getitem, parents, values)[last]
        refuse_secrets(_texts(values))
        values["content"] = _contents(values)
        try:
            spec = cls.model_validate(values)
        except ValidationError as error:
            raise UserError(describe(error)) from error
        if spec.method.ranked and spec.r is None:
            raise UserError(f"method={spec.method.name} needs a rank: r=8, say.")
        if not spec.method.ranked and spec.r is not None:
            refer = ""
            if spec.method.peft:
                refer = f" say which argument of its PEFT config is the rank: '+method.peft.r=${{r}}' r={spec.r}, or"
            raise UserError(
                f"method={spec.method.name} has no rank, so r={spec.r} can't be: leave r out,{refer or ' or'} choose "
                f"a method that has one: python train.py method=lora r={spec.r}"
            )
        name = spec.trainer.name if not spec.trainer.stage or spec.trainer.offload else f"zero{spec.trainer.stage}"
        if why := spec.method.cannot.get(name):
            raise UserError(f"method={spec.method.name} can't run under trainer={name}: {why}")
        if spec.model.base:
            base = spec.base_spec()
            spec = spec.model_copy(update={"model": spec.model.model_copy(update={"base_id": base.id})})
        return spec

    def base_spec(self) -> RunSpec:
        """The run that trains this run's base: the same model from scratch, on the task `model.base`."""
        assert self.model.base is not None
        base = _base_spec(self.model.base, self.scale)
        model = self.model.model_copy(update={"base": None, "base_id": None})
        return base.model_copy(update={"model": model})

    def with_seed(self, seed: int) -> RunSpec:
        """The same run with another seed, as it would be composed."""
        return self.model_copy(update={"seed": seed, "task": {**self.task, "seed": seed}})

    def setting(self, key: str) -> Any:
        """The value of a dotted key, such as `lr` or `method.peft.lora_alpha`."""
        return reduce(_part, key.split("."), self)

    def with_settings(self, settings: Mapping[str, Any]) -> RunSpec:
        """The same run with other values of dotted keys that no other value follows from."""
        spec = self
        for key, value in settings.items():
            spec = _replaced(spec, key.split("."), value)
        return spec

    @property
    def name(self) -> str:
        """The method's title and the rank: 'LoRA r=8', 'FFT'."""
        return self.method.title if self.r is None else f"{self.method.title} r={self.r}"

    @property
    def id(self) -> str:
        """`<scale>-<task>-<method>[-r<rank>]-s<seed>-<hash>`; the hash covers all but words for the reader.

        Fields at their default are left out of it, so that a field that is added later changes no earlier run's id.
        """
        values = self.model_dump(mode="json", exclude_defaults=True)
        for part in (values["method"], values["model"], values["task"]):
            for words in ("title", "source", "cannot"):
                part.pop(words, None)
        for key, default in LATER_TASK_KEYS.items():
            if values["task"].get(key, default) == default:
                values["task"].pop(key, None)
        values["model"].setdefault("base_id", None)  # older than this rule
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:10]
        rank = "" if self.r is None else f"-r{self.r}"
        return f"{self.scale}-{self.task['name']}-{self.method.name}{rank}-s{self.seed}-{digest}"

    def differences(self, other: RunSpec) -> dict[str, Any]:
        """The dotted keys in which another run differs from this one, with its values (None where it has none)."""
        ours, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        return {key: theirs.get(key) for key in ours | theirs if ours.get(key) != theirs.get(key)}

    def notices(self) -> list[str]:
        """What the user should know of a valid spec: so far, a recipe taken from another rank."""
        row = find_row(self.scale, self.task["name"], self.method.recipe, self.r)
        if self.r is not None and row.get("r", self.r) != self.r:
            return [
                f"no recipe for r={self.r} at scale={self.scale}: taking that of r={row['r']} "
                f"(conf/recipes/{self.scale}.yaml); lr={self.lr:g}"
            ]
        return []


@cache
def _base_spec(task: str, scale: str) -> RunSpec:
    """The run that trains a base at a scale, with the sizes of model=mini."""
    return RunSpec.from_config(compose_config(["method=fft", f"task={task}", f"scale={scale}", "model=mini"]))


def _part(values: Any, name: str) -> Any:
    return values[name] if isinstance(values, dict) else getattr(values, name)


def _replaced(values: Any, path: list[str], value: Any) -> Any:
    """A copy of nested models and dictionaries with another value at a path."""
    name, *rest = path
    new = _replaced(_part(values, name), rest, value) if rest else value
    return {**values, name: new} if isinstance(values, dict) else values.model_copy(update={name: new})


def _texts(values: Any) -> list[str]:
    """All texts in nested values."""
    if isinstance(values, dict):
        return [text for value in values.values() for text in _texts(value)]
    if isinstance(values, list):
        return [text for value in values for text in _texts(value)]
    return [values] if isinstance(values, str) else []


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _contents(values: dict[str, Any]) -> dict[str, str]:
    """sha256 of the local files and folders that a configuration names, so that another content is another run."""
    named = {key: values[key.split(".")[0]].get(key.split(".")[1]) for key in NAMING_FILES}
    named |= {f"eval.data.{name}": path for name, path in values["eval"]["data"].items()}
    return {key: sha256_of(Path(path)) for key, path in named.items() if path and Path(path).exists()}


@cache
def sha256_of(source: Path) -> str:
    """Of a file's content, or of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]:
        if source.is_dir():
            digest.update(f"{path.relative_to(source)}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def briefly(error: ValidationError) -> str:
    """The first three wrong values of a user's file: where, and what is wanted."""
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3])


def describe(error: ValidationError, script: str = "train.py") -> str:
    """`problems`, and how a script shows all its values."""
    return f"{problems(error)}. See it whole: python {script} --cfg job --resolve"


def problems(error: ValidationError) -> str:
    """One line per wrong value: its key, the value, what is wanted."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        problem = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list, such as [75,300]")
        shown = f"{key}={item['input']!r}: " if not isinstance(item["input"], dict) else (f"{key}: " if key else "")
        lines.append(shown + problem[0].lower() + problem[1:])
    return "\n       ".join(lines)


def script_config(kind: type[Config], config: DictConfig, script: str) -> Config:
    """The composed configuration conf/scripts/<script>.yaml of a script, validated.

    Raises UserError: a missing value, or one of the wrong kind.
    """
    try:
        return kind.model_validate(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise explain(error, [], CONF / "scripts" / f"{script}.yaml") from error
    except ValidationError as error:
        raise UserError(describe(error, f"scripts/{script}.py")) from error
