"""A cluster's profile, and what a run takes there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from ..errors import UserError, did_you_mean
from ..spec import RunSpec
from ..spec.compose import CONF
from ..spec.run_spec import Strict, problems
from ..spec.secrets import refuse_secrets

LAUNCHER = CONF / "launcher"


class Shape(Strict):
    """What an element of an array takes: nodes, processes on each, minutes, and runs side by side."""

    nodes: PositiveInt = 1
    processes: PositiveInt | None = None
    minutes: PositiveInt
    packed: PositiveInt = 1

    @property
    def total(self) -> int:
        return self.nodes * (self.processes or 1)


class Profile(Shape):
    """A cluster, as conf/launcher/slurm.yaml explains each key."""

    partition: str | None
    account: str | None
    qos: str | None
    small_partition: str | None
    sbatch: tuple[str, ...]
    gpus_per_node: NonNegativeInt
    gpu_type: str | None
    cpus_per_process: PositiveInt
    memory_gb: PositiveFloat | None
    tasks: dict[str, dict[str, PositiveInt]]
    at_once: PositiveInt | None
    array_size: PositiveInt
    signal_seconds: PositiveInt
    requeues: NonNegativeInt
    modules: tuple[str, ...]
    setup: tuple[str, ...]
    python: str | None
    container: tuple[str, ...]
    env: dict[str, str]
    interface: str | None
    scratch: str | None
    offline: bool

    @field_validator("*", mode="after")
    @classmethod
    def _one_line_each(cls, value: Any) -> Any:
        """A line break would end a line of the script; the next would be a command."""
        if any(not character.isprintable() for text in _texts(value) for character in text):
            raise ValueError("has a line break or a control character")
        return value

    @field_validator("env")
    @classmethod
    def _variables(cls, env: dict[str, str]) -> dict[str, str]:
        if wrong := [name for name in env if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
            raise ValueError(f"{wrong[0]!r} is no name of a variable")
        return env

    @model_validator(mode="after")
    def _check(self) -> Profile:
        shapes = [(f"tasks.{name}.", self.of_task(name)) for name in self.tasks]
        for where, shape in [("", Shape(**{key: getattr(self, key) for key in Shape.model_fields})), *shapes]:
            if shape.minutes * 60 <= self.signal_seconds + 60:
                raise ValueError(
                    f"{where}minutes={shape.minutes} is too short for a checkpoint: runs are told to save "
                    f"signal_seconds={self.signal_seconds} before the end, and need a minute to start. Say "
                    f"minutes: {self.signal_seconds // 60 + 3} or more"
                )
            if self.gpus_per_node and max(shape.packed, shape.processes or 1) > self.gpus_per_node:
                raise ValueError(
                    f"{where}processes={shape.processes} or {where}packed={shape.packed} is more than "
                    f"gpus_per_node={self.gpus_per_node}: each process and each packed run has a GPU of its own"
                )
        return self

    def of_task(self, task: str) -> Shape:
        """What a run of a task takes, as the profile says."""
        keys = {key: getattr(self, key) for key in Shape.model_fields}
        return Shape.model_validate({**keys, **self.tasks.get(task, {})})

    @classmethod
    def load(cls, name: str | None) -> Profile:
        """A profile by name or file; None: the defaults. Raises UserError: no such one, unknown keys, wrong values."""
        values = yaml.safe_load((LAUNCHER / "slurm.yaml").read_text())
        if name is not None:
            values |= _read_profile(name)
        known = cls.model_fields
        if unknown := [str(key) for key in values if key not in known]:
            raise UserError(
                f"profile={name} has the unknown key {unknown[0]!r}.{did_you_mean(unknown[0], known)} All keys, with "
                f"what they mean: {LAUNCHER / 'slurm.yaml'}"
            )
        for index, line in enumerate(_texts(values), 1):
            try:
                refuse_secrets([line])
            except UserError as error:
                raise UserError(f"profile={name}, value {index}: {error}") from None
        refuse_secrets([f"{key}={value}" for key, value in values["env"].items()])
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(
                f"profile={name}: {problems(error)}. What the keys mean: {LAUNCHER / 'slurm.yaml'}"
            ) from error


def _read_profile(name: str) -> dict[str, Any]:
    known = sorted(path.stem for path in (LAUNCHER / "profile").glob("*.yaml"))
    path = LAUNCHER / "profile" / f"{name}.yaml" if name in known else Path(name)
    if path.suffix != ".yaml" or not path.exists():
        raise UserError(
            f"profile={name} is none of {', '.join(known)} and no .yaml file that is here.{did_you_mean(name, known)} "
            f"Make one: cp {LAUNCHER / 'profile' / known[0]}.yaml mycluster.yaml, and profile=mycluster.yaml"
        )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"profile={name} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"profile={name} has no keys. What there is: {LAUNCHER / 'slurm.yaml'}")
    return values


def shape_of(spec: RunSpec, profile: Profile) -> Shape:
    """What a run takes on a cluster.

    Raises UserError: processes that do not fill their nodes, or can't share the batch.
    """
    from ..training import batch_shape  # takes seconds

    shape = profile.of_task(spec.task["name"])
    per_node = shape.processes or profile.gpus_per_node or 1
    wanted = spec.trainer.processes
    if wanted is None:
        shape = shape.model_copy(update={"processes": per_node})
    elif wanted <= per_node:
        shape = shape.model_copy(update={"nodes": 1, "processes": wanted})
    elif wanted % per_node == 0:
        shape = shape.model_copy(update={"nodes": wanted // per_node, "processes": per_node})
    else:
        raise UserError(
            f"trainer.processes={wanted} does not fill nodes of {per_node} processes. Take a multiple, such as "
            f"trainer.processes={wanted // per_node * per_node}, or trainer.processes=null for those of the profile"
        )
    batch_shape(spec.training, shape.total)
    return shape if shape.total == 1 and not spec.trainer.stage else shape.model_copy(update={"packed": 1})


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested values, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.items():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
