"""A finished run's weights for others: an adapter that PEFT loads, or a whole model that transformers loads."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path

from omegaconf import DictConfig
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from .errors import UserError, did_you_mean
from .methods import is_gguf, load_base, load_tokenizer
from .results.records import Record, Store
from .spec import RunSpec
from .spec.run_spec import Strict, script_config

ADAPTER = "adapter_config.json"
BASE = "base"  # an adapter's base model lies here where no hub and no other folder has it in a form that PEFT loads
# Neither is for others: the Trainer's pickle of its arguments, and PEFT's form of a model card.
LEFT_OUT = ("training_args.bin", "README.md")


class Export(Strict):
    """conf/scripts/export.yaml, validated."""

    run: str
    merge: bool
    to: str | None
    out: str


def main(config: DictConfig) -> int:
    """`python scripts/export.py`.

    Raises UserError: no such run, no weights of it, a folder that is there or can't be written, a method that can't
    be merged.
    """
    quiet_libraries()
    wanted = script_config(Export, config, "export")
    store = Store(wanted.out)
    record = finished_record(wanted.run, store)
    weights = weights_of(record, store)
    to = Path(wanted.to) if wanted.to else store.out / "export" / record.id
    if to.exists():
        raise UserError(f"to={to} is there already. Choose another folder, to=<folder>, or remove it: rm -r {to}")
    partial = to.with_name(f".{to.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        what = export(record, store, weights, wanted.merge, partial, to)
        partial.rename(to)
    except (OSError, SafetensorError) as error:
        raise UserError(f"to={to} can't be written ({error}). Choose another folder: to=<folder>") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"exported: {to}, {what}\nhow to load it: {to / 'README.md'}", file=sys.stderr)
    return 0


def quiet_libraries() -> None:
    """For scripts that load weights and train nothing."""
    warnings.simplefilter("ignore", FutureWarning)  # of what PEFT calls in transformers
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where PEFT looks for it, warns
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def export(record: Record, store: Store, weights: Path, merge: bool, folder: Path, to: Path) -> str:
    """Write a run's weights into `folder`, which will be renamed to `to`; returns what they are, in words."""
    spec = record.spec
    shutil.copytree(weights, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    adapter = (folder / ADAPTER).exists()
    elsewhere = _base_elsewhere(spec)
    if adapter and elsewhere is None:
        _write_base(record, store, folder / BASE)
    if adapter and merge:
        merged = _merged(spec, weights, elsewhere or str(folder / BASE))
        shutil.rmtree(folder / BASE, ignore_errors=True)
        for path in folder.glob("adapter_*"):
            path.unlink()
        merged.save_pretrained(folder)
        what = "the adapter merged into its base: a whole model"
    elif adapter:
        _name_base(spec, folder / ADAPTER, to)
        what = f"an adapter of PEFT for {elsewhere or f'the base in {BASE}/'}"
    else:
        what = "a whole model" + (" (nothing to merge)" if merge else "")
    (folder / "README.md").write_text(_readme(record, what, adapter and not merge))
    return what


def finished_record(run: str, store: Store) -> Record:
    record = store.load(run)
    if record is None:
        known = [path.stem for path in (store.out / "runs").glob("*.json")]
        raise UserError(
            f"run={run}: {store.out / 'runs'} has no record of that name.{did_you_mean(run, known)} "
            f"All: ls {store.out / 'runs'}"
        )
    if record.status != "finished":
        raise UserError(
            f"run={run} has not finished (its status: {record.status}). Run it: {command_of(record, store)}"
        )
    return record


def weights_of(record: Record, store: Store) -> Path:
    """Where the weights lie; work/ is not kept with the records."""
    folder = store.work(record.id) / "model"
    if not folder.exists():
        raise UserError(
            f"the weights of {record.id} are not in {folder}: records are kept without them. Make them again: "
            f"{command_of(record, store)} rerun=true"
        )
    return folder


def command_of(record: Record, store: Store) -> str:
    return record.command + ("" if store.out == Path("results") else f" out={shlex.quote(str(store.out))}")


def _base_elsewhere(spec: RunSpec) -> str | None:
    """The hub id or folder that has the base; None where it has to go along: the suite made it, or it is a GGUF file,
    which PEFT can't load."""
    source = spec.model.pretrained
    return None if source is None or is_gguf(source) else source


def _write_base(record: Record, store: Store, folder: Path) -> None:
    """The base that goes along: trained by a run, random as the run's seed makes it, or read from a GGUF file."""
    spec = record.spec
    if spec.model.base_id is None:
        tokenizer = load_tokenizer(spec)
        set_seed(spec.seed)
        load_base(spec, tokenizer, None).save_pretrained(folder)
        return
    base = store.load(spec.model.base_id)
    if base is None:
        raise UserError(
            f"{record.id} adapts the weights of {spec.model.base_id}, and {store.out / 'runs'} has no record of that. "
            f"Make both again: {command_of(record, store)} rerun=true"
        )
    shutil.copytree(weights_of(base, store), folder, ignore=shutil.ignore_patterns(*LEFT_OUT))


def _merged(spec: RunSpec, adapter: Path, base: str) -> PreTrainedModel:
    """The base with the adapter merged into its weights, in the dtype in which it is stored."""
    if module := registering_module(spec):
        importlib.import_module(module)
    alone = f"Export the adapter as it is: merge=false (method={spec.method.name})"
    try:
        model = AutoModelForCausalLM.from_pretrained(base, revision=spec.model.revision, dtype="auto")
        adapted = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"to merge, the base {base} and the adapter in {adapter} are loaded, and that fails: {reason}. {alone}"
        ) from error
    if not hasattr(type(adapted.base_model), "merge_and_unload"):  # it is the bare model where prompts are learned
        raise UserError(f"{spec.name} can't be merged: it changes no weight of the model. {alone}")
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{spec.name} can't be merged: {error} {alone}") from error


def registering_module(spec: RunSpec) -> str | None:
    """The module whose import tells PEFT of the method; None for PEFT's own."""
    module = str((spec.method.peft or {}).get("_target_", "peft")).rpartition(".")[0]
    return None if module.split(".")[0] in ("peft", "") else module


def _name_base(spec: RunSpec, config: Path, to: Path) -> None:
    """Say in an adapter's configuration where its base is: a hub id, or a folder by its full name."""
    elsewhere = _base_elsewhere(spec)
    base = elsewhere or str(to / BASE)
    local = elsewhere is None or Path(base).exists()
    values = json.loads(config.read_text())
    values |= {"base_model_name_or_path": str(Path(base).resolve()) if local else base, "revision": spec.model.revision}
    config.write_text(json.dumps(values, indent=2) + "\n")


def _readme(record: Record, what: str, adapter: bool) -> str:
    """What the folder is and how to load it, with code for a process whose working folder it is."""
    spec = record.spec
    base = _base_elsewhere(spec)
    if base and Path(base).exists():
        base = str(Path(base).resolve())
    revision = f", revision={spec.model.revision!r}" if base and spec.model.revision else ""
    code = []
    if adapter and (module := registering_module(spec)):
        code += [f"import {module}  # before the adapter is loaded: it registers the method in PEFT", ""]
    code += [
        *(["from peft import PeftModel"] if adapter else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({(base or BASE) if adapter else '.'!r}{revision * adapter})",
        *(['model = PeftModel.from_pretrained(model, ".")'] if adapter else []),
        'tokenizer = AutoTokenizer.from_pretrained(".")',
    ]
    lines = [
        f"# {spec.name} on {spec.task['title']}",
        "",
        f"Here is {what}. It comes from the run `{record.id}` of mora-repro, started on {record.started[:10]}:",
        "",
        f"- method: {spec.name} ({spec.method.source})",
        f"- model: {spec.model.title}{f', {spec.model.pretrained}' if spec.model.pretrained else ''}",
        f"- task: {spec.task['title']}",
        *([f"- trained: {p.trainable:,} of {p.total:,} parameters"] if (p := record.parameters) else []),
        *(f"- {name} after training: {value:.2f}" for name, value in record.metrics.items()),
        f"- made by: `{record.command}`",
        "",
        "In this folder, where `pip install .` in a checkout of mora-repro has installed what is imported:"
        if adapter and registering_module(spec)
        else "In this folder:",
        "",
        "```python",
        *code,
        "```",
    ]
    return "\n".join(lines) + "\n"
