"""The spectrum of a run's weight update (the paper's Figure 5): how many of its singular values are above 0.1."""

from __future__ import annotations

import statistics
import sys

import torch
from omegaconf import DictConfig
from peft import PeftModel
from rich.progress import track
from torch import nn
from transformers import PreTrainedModel

from .disk import weights_sha256
from .errors import UserError
from .export import command_of, finished_record, quiet_libraries, weights_of
from .methods import load_tokenizer
from .results.aggregate import collect
from .results.records import SINGULAR_VALUES, Record, Spectrum, Store
from .scoring import load_model
from .spec.run_spec import Strict, script_config
from .spec.table import load_table

THRESHOLD = 0.1  # of the paper's Figure 5


class Wanted(Strict):
    """conf/scripts/spectrum.yaml, validated."""

    run: str | tuple[str, ...] | None
    table: str | int | None
    scale: str
    out: str


def main(config: DictConfig) -> int:
    """`python scripts/spectrum.py`; the exit status: 0, 1 where a run of the table has no weights any more.

    Raises UserError: no such run or table, no weights of the run named, or weights that no adapter can be merged into.
    """
    quiet_libraries()
    wanted = script_config(Wanted, config, "spectrum")
    store = Store(wanted.out)
    if (wanted.run is None) == (wanted.table is None):
        raise UserError("which runs? run=<id>, or table=figure5 scale=mini for those of a table, and not both")
    status = 0
    if wanted.run is not None:
        runs = (wanted.run,) if isinstance(wanted.run, str) else wanted.run
        records = [finished_record(run, store) for run in runs]
    else:
        results = collect(load_table(str(wanted.table)).cells(wanted.scale), store.load_all()[0])
        finished = [record for result in results for record in result.records.values()]
        if not finished:
            raise UserError(
                f"table={wanted.table} scale={wanted.scale} has no finished run in {store.out / 'runs'}. Make them: "
                f"python scripts/sweep.py table={wanted.table} scale={wanted.scale} seeds=3"
            )
        records = []
        for record in (record for record in finished if record.spectrum is None):
            if (store.work(record.id) / "model").exists():
                records.append(record)
            else:
                again = f"{command_of(record, store)} rerun=true"
                print(f"the weights of {record.id} are gone. Make them again: {again}", file=sys.stderr)
                status = 1
    for record in track(records, "singular values", disable=not sys.stderr.isatty()):
        with store.explained():
            found = spectrum(record, store)
            mean = statistics.fmean(count for counts in found.above.values() for count in counts)
            metrics = record.metrics | {SINGULAR_VALUES: mean}
            path = store.save(record.model_copy(update={"spectrum": found, "metrics": metrics}))
        kinds = ", ".join(f"{kind} {statistics.fmean(counts):.1f}" for kind, counts in found.above.items())
        print(f"{record.id}: singular values above {found.threshold}: {kinds}; mean {mean:.1f} (in {path})")
    return status


def spectrum(record: Record, store: Store) -> Spectrum:
    """The singular values of what a finished run changed in its linear layers, of the trained model's kept weights.

    The update is the layer's weight after training, adapters merged, less that before: of methods that merge, the sum
    of all their updates. In fp32, on a GPU where there is one.
    """
    spec = record.spec
    assert record.data is not None  # it finished
    base = spec.model.base_id
    if base and weights_sha256(weights_of(finished_record(base, store), store)) != record.data.base_sha256:
        raise UserError(
            f"{record.id} started from other weights than {store.work(base)} has, made on another machine, say. "
            f"Make it again: {command_of(record, store)} rerun=true"
        )
    tokenizer = load_tokenizer(spec)
    trained = load_model(spec, tokenizer, weights_of(record, store), store).float()
    if isinstance(trained, PeftModel):
        if not hasattr(type(trained.base_model), "merge_and_unload"):  # the bare model where prompts are learned
            raise UserError(f"{spec.name} changes no weight of the model: it has no spectrum")
        trained = trained.merge_and_unload(safe_merge=True)
    before = load_model(spec, tokenizer, None, store)
    return spectrum_between(before, trained)


def spectrum_between(before: PreTrainedModel, after: PreTrainedModel) -> Spectrum:
    """Of the update between two models of the same layers, output layer and embeddings left out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights, head = dict(before.named_parameters()), after.get_output_embeddings()
    above: dict[str, list[int]] = {}
    for name, layer in after.named_modules():
        if isinstance(layer, nn.Linear) and layer is not head:
            old, new = (each.detach().to(device, torch.float32) for each in (weights[f"{name}.weight"], layer.weight))
            count = int((torch.linalg.svdvals(new - old) > THRESHOLD).sum())
            above.setdefault(name.rpartition(".")[2], []).append(count)
    return Spectrum(threshold=THRESHOLD, above=above)
