"""What a run needs, ahead of time, for a machine without internet: `python scripts/prepare.py`."""

from __future__ import annotations

import resource
from itertools import accumulate, groupby

from omegaconf import DictConfig, open_dict
from pydantic import NonNegativeInt, ValidationError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .data.benchmarks import refuse_unread
from .data.preparation import is_prepared, prepare
from .data.task import IGNORED, build_task
from .data.tokens import Example, processes
from .distributed import say
from .errors import UserError
from .evaluation import fetch
from .methods import download, load_tokenizer, refuse_too_long
from .results.records import Store
from .spec import RunSpec
from .spec.run_spec import Strict, describe


class Wanted(Strict):
    """The key of conf/prepare.yaml that a run has not."""

    show: NonNegativeInt


def main(config: DictConfig) -> int:
    """Prepare the model, the tokenizer, the benchmarks' data and the training set of the composed run.

    Raises UserError: what is needed can't be had, or does not fit the model.
    """
    transformers_logging.set_verbosity_error()
    with open_dict(config):
        values = {"show": config.pop("show")}
    try:
        wanted = Wanted.model_validate(values)
    except ValidationError as error:
        raise UserError(describe(error, "scripts/prepare.py")) from error
    spec = RunSpec.from_config(config)
    store = Store(config.out)
    download(spec)
    tokenizer = load_tokenizer(spec)
    task = build_task(spec).for_tokenizer(tokenizer)
    benchmarks = task.benchmarks(spec.eval)
    refuse_unread(spec.eval.data, benchmarks)
    fetch(benchmarks)
    if task.packed:  # known before hours of preparation
        refuse_too_long(spec, tokenizer, spec.training.max_length)
    with store.explained():
        data = prepare(spec, task, tokenizer, store.out)
    refuse_too_long(spec, tokenizer, max(data.lengths))
    for notice in [*task.notices(), *data.notices()]:
        say(notice)
    for index in range(min(wanted.show, len(data))):
        print(f"--- {index + 1} of {len(data)}: {data.lengths[index]} tokens\n{as_text(tokenizer, data[index])}")
    own, others = (resource.getrusage(who).ru_maxrss / 1000 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    say(
        f"{task.title}: {len(data):,} samples, {data.tokens:,} tokens in {data.folder}; measured by "
        f"{', '.join(benchmark.name for benchmark in benchmarks)}; resident memory of all processes at most "
        f"{own + processes() * others:,.0f} MB"
    )
    return 0


def missing(spec: RunSpec, store: Store) -> str | None:
    """What of `main`'s a run has not got yet, in words; None where all is there.

    The hub's libraries are to be offline (HF_HUB_OFFLINE), so that nothing is fetched.
    """
    transformers_logging.set_verbosity_error()
    try:
        download(spec)
        tokenizer = load_tokenizer(spec)
        task = build_task(spec).for_tokenizer(tokenizer)
        fetch(task.benchmarks(spec.eval))
    except UserError as error:
        return str(error)
    if spec.task.get("data", "generated") == "generated" or is_prepared(spec, task, tokenizer, store.out):
        return None  # what is generated is made in seconds
    return f"the training set is not in {store.out / 'data'}"


def as_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """An example's text, special tokens too, the trained part between >> and <<; in a block, a line per document."""
    starts = [position == 0 for position in example.position_ids or ()] or [False] * len(example.labels)
    documents = accumulate(starts)
    parts = zip(documents, (label != IGNORED for label in example.labels), example.input_ids, strict=True)
    lines: dict[int, str] = {}
    for (document, trained), tokens in groupby(parts, lambda part: part[:2]):
        text = str(tokenizer.decode([token for *_, token in tokens]))
        lines[document] = lines.get(document, "") + (f">>{text}<<" if trained else text)
    return "\n".join(f"[document] {line}" if example.position_ids else line for line in lines.values())
