"""What a run is told beside its spec, which changes nothing that it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, PositiveInt, ValidationError

from ..errors import UserError
from .run_spec import RunSpec, Strict, describe


class Options(Strict):
    """`out` is the folder of output, `overrides` what the spec was composed from, for the record; with `plan` the run
    is planned alone."""

    out: str
    rerun: bool = False
    plan: bool = False
    keep_checkpoints: PositiveInt = 2
    logger: dict[str, Any] = Field(default={"name": "none"})
    overrides: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: DictConfig, overrides: list[str]) -> Options:
        """Raises UserError: a value of the wrong kind."""
        try:
            return cls.model_validate(
                {
                    "out": config.out,
                    "rerun": config.rerun,
                    "plan": config.plan,
                    "keep_checkpoints": config.trainer.keep_checkpoints,
                    "logger": OmegaConf.to_container(config.logger, resolve=True),
                    "overrides": tuple(text for text in overrides if not text.startswith(("out=", "rerun=", "logger"))),
                }
            )
        except ValidationError as error:
            raise UserError(describe(error)) from error


class RunFile(Strict):
    """A run as it is handed to its worker processes: `work/<id>/run.json`."""

    spec: RunSpec
    options: Options
    need_weights: bool = False  # a record alone does not do

    @classmethod
    def load(cls, path: Path) -> RunFile:
        return cls.model_validate_json(path.read_text())
