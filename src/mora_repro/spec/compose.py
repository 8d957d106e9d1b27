"""The Hydra side: recipes as resolvers, `scale=auto`, and errors that name what would work."""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from .. import imported
from ..errors import UserError, did_you_mean
from ..signals import interrupts_by_every_signal, wait_to_be_ended
from .secrets import refuse_secrets

ROOT = Path(__file__).resolve().parents[3]
CONF = ROOT / "conf"
RUN = CONF / "config.yaml"
METHODS_CSV = ROOT / "results" / "methods.csv"  # written by scripts/methods.py
INTERRUPTED = 130  # the exit status of what was stopped and can go on
GO_ON = ("config", "sweep")  # the configurations of what goes on after an interrupt, and does not start over


def options(group: str) -> list[str]:
    """The choices of a config group: the names of its files, but for those that others share (_*.yaml)."""
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


# ---------------------------------------------------------------------------------------------------
# Recipes


@cache
def recipes(scale: str) -> dict[str, Any]:
    """conf/recipes/<scale>.yaml."""
    with (CONF / "recipes" / f"{scale}.yaml").open() as file:  # a file, so that a mistake in it is shown with its name
        return yaml.safe_load(file)


def find_row(scale: str, task: str, method: str, r: int | None) -> dict[str, Any]:
    """The recipe's row for a method at the rank nearest to `r` on a log scale (the lower one of two).

    Raises UserError where the task has no recipe for the method at this scale.
    """
    tasks = recipes(scale)
    if task not in tasks:
        raise UserError(
            f"task={task} has no recipe at scale={scale}; there are recipes for "
            f"{', '.join(name for name in tasks if name != 'common')} (conf/recipes/{scale}.yaml)."
        )
    rows = [row for row in tasks[task]["rows"] if row["method"] == method]
    if not rows:
        known = sorted({row["method"] for row in tasks[task]["rows"]})
        raise UserError(
            f"task={task} has no recipe for method={method} at scale={scale}; it has {', '.join(known)}. "
            f"Add a row to conf/recipes/{scale}.yaml."
        )
    if r is None or r < 1:
        return rows[0]
    return min(rows, key=lambda row: (abs(math.log(row.get("r", r) / r)), row.get("r", r)))


def rows_of(scale: str, task: str) -> list[dict[str, Any]]:
    """All rows of a task's recipe."""
    return recipes(scale)[task]["rows"]


def recipe_value(scale: str, task: str, method: str, r: int | None, key: str) -> Any:
    """A recipe's value for a task, method and r; row over task over common. Raises UserError where there is none."""
    row = find_row(scale, task, method, r)
    for level in (row, recipes(scale)[task], recipes(scale)["common"]):
        if key in level:
            return level[key]
    raise UserError(f"conf/recipes/{scale}.yaml has no `{key}` for task={task} method={method}.")


def _recipe(key: str, *, _root_: DictConfig) -> Any:
    """`${recipe:key}`: `recipe_value` for this run."""
    scale, task, method = _root_.scale.name, _root_.task.name, _root_.method.recipe
    if not isinstance(_root_.r, int | None):
        raise UserError(f"r={_root_.r!r}: a rank is a whole number, such as r=8")
    value = recipe_value(scale, task, method, _root_.r, key)
    return OmegaConf.create(value) if isinstance(value, list) else value


def _default_rank(*, _root_: DictConfig) -> int | None:
    """`${default_rank:}`: that of the task's recipe, else the scale's low rank; None for a method without a rank."""
    if not _root_.method.ranked:
        return None
    return recipes(_root_.scale.name).get(_root_.task.name, {}).get("default_rank", _root_.scale.ranks.low)


def _refers_to_r(*, _root_: DictConfig) -> bool:
    """`${refers_to_r:}`: whether an argument of the method's PEFT config mentions r, so that a rank has a meaning."""
    return "${r}" in str(OmegaConf.to_container(_root_.method.peft, resolve=False))


def _times_r(factor: float, *, _root_: DictConfig) -> int:
    """`${times_r:1.5}`: r times a factor, rounded to the nearest rank and at least 1."""
    return max(1, math.floor(_root_.r * factor + 0.5))


def off_budget(row: Mapping[str, str | int], r: int) -> bool:
    """Whether a row of METHODS_CSV has more than 2 % more or less parameters than a LoRA of rank r."""
    return row["method"] != "fft" and abs(int(row[f"r{r}"]) / int(row[f"lora_r{r}"]) - 1) > 0.02


def _methods(r: int) -> str:
    """`${methods:8}`: a line per method with its trainable parameters at that r, from METHODS_CSV; "-" if not there."""
    rows = {}
    if METHODS_CSV.exists():
        with METHODS_CSV.open(newline="") as file:
            rows = {row["method"]: row for row in csv.DictReader(file)}
    lines = []
    for name in options("method"):
        count, source = "-", ""
        if row := rows.get(name):
            source = row["source"].split(";")[0]
            if row[f"r{r}"]:
                count = f"{int(row[f'r{r}']):,}{'†' if off_budget(row, r) else ' '}"
        lines.append(f"    {name:<14}{count:>14}  {source}")
    return "\n".join(lines)


OmegaConf.register_new_resolver("recipe", _recipe, replace=True)
OmegaConf.register_new_resolver("default_rank", _default_rank, replace=True)
OmegaConf.register_new_resolver("refers_to_r", _refers_to_r, replace=True)
OmegaConf.register_new_resolver("times_r", _times_r, replace=True)
OmegaConf.register_new_resolver("methods", _methods, replace=True)
OmegaConf.register_new_resolver("options", lambda group: ", ".join(options(group)), replace=True)


# ---------------------------------------------------------------------------------------------------
# Composing


def resolve_scale(arguments: list[str]) -> tuple[list[str], str | None]:
    """Replace `scale=auto` (or no scale) by mini or paper; returns the arguments and what to tell.

    paper inside a SLURM job or where torch finds a CUDA device, else mini.
    """
    chosen = [argument for argument in arguments if argument.startswith("scale=")]
    if any("," in argument and "auto" in argument for argument in chosen):
        raise UserError(f"{chosen[-1]}: auto is one of the scales, and can't be swept. Name them: scale=mini,paper")
    if chosen and chosen[-1] != "scale=auto":
        return arguments, None
    rest = [argument for argument in arguments if argument != "scale=auto"]
    if {"--help", "-h", "--hydra-help"} & set(arguments):
        return rest, None
    if "SLURM_JOB_ID" in os.environ:
        scale, why = "paper", "inside a SLURM job"
    else:
        import torch

        found = torch.cuda.is_available()
        scale, why = ("paper", "CUDA device found") if found else ("mini", "no CUDA device found")
    other = "mini" if scale == "paper" else "paper"
    return [f"scale={scale}", *rest], f"scale={scale} (auto: {why}; scale={other} asks for the other)"


def with_model(overrides: list[str]) -> list[str]:
    """The overrides, behind the model that the task's recipe names (`model`), where it names one and they do not.

    A default of Hydra's can depend on the scale or on the task, and this one depends on both.
    """
    chosen = dict(text.split("=", 1) for text in overrides if "=" in text)
    scale, task = chosen.get("scale", "mini"), chosen.get("task", "uuid")
    if "model" in chosen or scale not in options("scale"):
        return overrides
    named = recipes(scale).get(task, {}).get("model")
    return [f"model={named}", *overrides] if named else overrides


def compose_config(overrides: list[str]) -> DictConfig:
    """Compose the configuration of a run. Raises UserError for an unknown choice or key."""
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", with_model(overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise explain(error, overrides, RUN) from error


def entry(config: Path, module: str) -> None:
    """Run a module's `main` as a Hydra application on the process's arguments, and exit with the status it returns.

    Args:
        config: the primary configuration, RUN or another with a run's groups in conf/, or a file in conf/scripts. Most
            scripts have a folder of their own, where `table` and `scale` are plain keys, since Hydra takes the name of
            a group for a choice.
        module: its name; imported once there is a configuration to run, not for --help.

    A UserError or an error of Hydra's is printed without a traceback, and the status is 2.
    """
    interrupts_by_every_signal()
    # Errors reach us instead of being printed by Hydra.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    status: list[int] = []

    def job(composed: DictConfig) -> None:
        GlobalHydra.instance().clear()  # so that other runs' configurations can be composed
        try:
            status.append(imported(module).main(composed) or 0)
        except UserError as error:  # here, since Hydra adds lines of its own to what it sees
            hydra_config = HydraConfig.get()
            many = hydra_config.mode == RunMode.MULTIRUN
            _exit(UserError(f"{' '.join(hydra_config.overrides.task)}: {error}") if many else error)
        if status[-1] == INTERRUPTED:
            raise KeyboardInterrupt  # the other runs of a multirun are not started

    try:
        refuse_secrets(sys.argv[1:])
        if config.parent == CONF:
            arguments, notice = resolve_scale(sys.argv[1:])
            # Overrides first: Hydra's parser takes no flag between them.
            overrides = with_model([text for text in arguments if "=" in text and not text.startswith("-")])
            sys.argv[1:] = [*overrides, *(text for text in arguments if text not in overrides)]
            if notice and _is_first():
                print(notice, file=sys.stderr, flush=True)
        hydra.main(version_base="1.3", config_path=str(config.parent), config_name=config.stem)(job)()
    except UserError as error:
        _exit(error)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        flags = any(text.startswith("-") for text in sys.argv[1:])  # a word without = may then be a flag's value
        _exit(explain(error, [a for a in sys.argv[1:] if not a.startswith("-") and ("=" in a or not flags)], config))
    except KeyboardInterrupt:
        without = " without rerun=true" if "rerun=true" in sys.argv else ""
        again = "goes on where it was" if config.stem in GO_ON else "starts over"
        print(f"interrupted; the same command{without} {again}.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(max(status, default=0))


def _is_first() -> bool:
    """Of the processes that torchrun or srun started, which all compose the same: the one that says it."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _exit(error: UserError) -> None:
    if _is_first():
        print(f"error: {error}", file=sys.stderr)
    elif wait_to_be_ended():
        os._exit(2)  # at once: a second signal finds nothing that it could interrupt
    else:
        print(f"error: rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID'))}: {error}", file=sys.stderr)
    sys.exit(2)


def explain(error: Exception, overrides: list[str], config: Path) -> UserError:
    """Turn an error of Hydra's or OmegaConf's into one that names the mistake and near matches."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, yaml.YAMLError):
            return UserError(f"a file of conf/ is no YAML: {cause}")
        cause = cause.__cause__ or cause.__context__
    parser = OverridesParser.create()
    known: list[str] | None = None
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            return UserError(
                f"{text!r} is no override: write key=value, and quote a value that has spaces or braces, "
                f"such as 'model.pretrained=\"my folder\"'."
            )
        key, value = override.key_or_group, override.value()
        group = config.parent == CONF and (CONF / key).is_dir()
        if group and isinstance(value, str | int):
            if str(value) not in options(key):
                choices = [*options(key), *(["auto"] if key == "scale" else [])]
                return UserError(
                    f"{key}={value} is not known.{did_you_mean(str(value), choices)} "
                    f"Choices for {key}: {', '.join(choices)}."
                )
            continue
        if override.is_add() or override.is_delete() or group:
            continue
        if known is None:
            known = _known_keys(config, overrides)
        if key not in known:
            tail = {name.split(".")[-1]: name for name in known}
            near = did_you_mean(key, known) or did_you_mean(key, tail)
            return UserError(f"{text}: there is no key {key!r}.{near} All keys: python {_script(config)} --cfg job")
    if isinstance(error, MissingMandatoryValue):
        absent = error.full_key
        return UserError(f"{absent} has no default and must be given; add to the command: {absent}=...")
    return UserError(str(error))


def _script(config: Path) -> str:
    return "train.py" if config == RUN else f"scripts/{config.stem}.py"


def _known_keys(config: Path, overrides: list[str]) -> list[str]:
    """All keys of the configuration with the overrides' valid group choices, dotted."""
    choices = [text for text in overrides if config.parent == CONF and (CONF / text.split("=")[0]).is_dir()]
    with hydra.initialize_config_dir(str(config.parent), version_base="1.3"):
        composed = hydra.compose(config.stem, [text for text in choices if "," not in text])
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for name in node:
            keys.append(prefix + str(name))
            if OmegaConf.is_dict(child := node._get_node(name)) and not child._is_none():
                walk(child, f"{prefix}{name}.")

    walk(composed, "")
    return keys
