"""The GPUs that runs are planned for: conf/gpus.yaml or a user's file, how many, and at what price."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import yaml
from pydantic import Field, PositiveFloat, ValidationError

from .errors import UserError, did_you_mean
from .spec import CONF
from .spec.run_spec import Strict, briefly


class Gpu(Strict):
    """An entry of conf/gpus.yaml: `memory_gb` in 10^9 bytes, `tflops` the peak of dense bf16 in 10^12 FLOP/s."""

    title: str
    memory_gb: PositiveFloat
    tflops: PositiveFloat
    source: str
    names: tuple[str, ...] = ()


class Machine(Strict):
    """The GPUs that are planned with. `nodes` is nodes x GPUs of each; `price` is of a GPU for an hour.

    None: the GPU of this machine, or an A100 80GB where it has none; and as many as the run would have here.
    """

    gpu: str | None
    gpus: str | None
    nodes: str | int | None
    utilisation: float = Field(gt=0, le=1)
    calibrate: str | None
    price: float | None = Field(ge=0)
    micro_batch: Literal["recipe", "largest"]

    def known(self) -> dict[str, Gpu]:
        """All GPUs that have a name. Raises UserError: the user's file can't be read, or is not of the form."""
        return known_gpus() | (read_gpus(Path(self.gpus)) if self.gpus else {})

    def model(self) -> Gpu:
        """The GPU. Raises UserError for a name that is not known."""
        known = self.known()
        name = self.gpu
        if name is None:
            here = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "A100-SXM4-80GB"
            name = gpu_called(here, known)
            if name is None:
                raise UserError(
                    f"this machine's GPU, {here}, is not in {CONF / 'gpus.yaml'}. Name one that is, "
                    f"gpu={next(iter(known))}, or give a file of your own in its form: gpus=<file> gpu=<name in it>"
                )
        if name not in known:
            raise UserError(
                f"gpu={name} is not known.{did_you_mean(name, known)} Choices: {', '.join(known)}; or one of a file "
                f"of your own in the form of {CONF / 'gpus.yaml'}: gpus=<file> gpu={name}"
            )
        return known[name]

    def shape(self) -> tuple[int, int] | None:
        """(nodes, GPUs of each). Raises UserError where `nodes` is not of that form."""
        if self.nodes is None:
            return None
        found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", str(self.nodes))
        if not found:
            raise UserError(
                f"nodes={self.nodes} can't be read: it is nodes x GPUs of each, such as nodes=2x8 for two nodes of "
                f"eight, or nodes=8 for one"
            )
        return int(found[1] or 1), int(found[2])


@cache
def known_gpus() -> dict[str, Gpu]:
    return read_gpus(CONF / "gpus.yaml")


def read_gpus(path: Path) -> dict[str, Gpu]:
    """Raises UserError: no such file, or not of the form of conf/gpus.yaml."""
    try:
        return {str(name): Gpu.model_validate(values) for name, values in yaml.safe_load(path.read_text()).items()}
    except OSError as error:
        raise UserError(f"gpus={path} can't be read ({error.strerror}).") from error
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"gpus={path} is no YAML of names. An example: {CONF / 'gpus.yaml'}") from error
    except ValidationError as error:
        raise UserError(f"gpus={path} has no GPUs ({briefly(error)}). An example: {CONF / 'gpus.yaml'}") from error


def gpu_called(device: str, known: dict[str, Gpu]) -> str | None:
    """The name of a GPU by what torch calls it; None where it is not known."""
    return next((name for name, gpu in known.items() if any(part in device for part in gpu.names)), None)
