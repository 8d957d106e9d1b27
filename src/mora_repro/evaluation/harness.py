"""lm-eval in process: on the model in memory, by all processes of the run."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
import numpy as np
import torch
from lm_eval import evaluate as ask_all
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import distributed
from ..data.benchmarks import Harness, Scores, column_of
from ..data.sources import SOURCES, rows_of
from ..data.task import prompt_tokens
from ..errors import UserError, did_you_mean
from ..progress import Bar
from .scores import scored

OURS = Path(__file__).parent / "tasks"
BUILT_IN = Path(lm_eval.tasks.__file__).parent
# Where the tasks of the paper's columns are; all of lm-eval's take seconds to look through.
NEEDED = [OURS, *(BUILT_IN / folder for folder in ("mmlu/default", "pubmedqa", "medqa"))]
BATCH = 64  # prompts at a time, at most
LOGITS = 1 << 28  # of a batch, at most: a GB in fp32, which lm-eval holds twice

# The form of the rows of a benchmark that a task generates: that of the AdaptLLM sets.
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "input",
    "doc_to_choice": "options",
    "doc_to_target": "gold_index",
    "target_delimiter": "",
    "num_fewshot": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}

logging.getLogger("lm_eval").setLevel(logging.ERROR)
lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # of the building of prompts, which has no switch


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Within, the generators start from a seed of their own; after it they are as before."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


# ---------------------------------------------------------------------------------------------------
# Tasks


@cache
def task_manager(everything: bool = False) -> TaskManager:
    """lm-eval's index of its tasks: of those that the paper's columns need, or of all."""
    return TaskManager(include_defaults=everything, include_path=[OURS] if everything else NEEDED)


@dataclass(frozen=True)
class Loaded:
    """lm-eval's tasks of a benchmark, by name, with their data; `by_size`: each sample counts alike, else each task."""

    tasks: dict[str, Task]
    by_size: bool = True


@untouched_random_state()
def tasks_of(benchmark: Harness) -> Loaded:
    """Load the tasks of a benchmark.

    Raises UserError: data that can't be had or read; a task that lm-eval has not.
    """
    key = column_of(benchmark)
    shots = {} if benchmark.shots is None else {"num_fewshot": benchmark.shots}
    if benchmark.rows is not None:
        rows = {"test": list(benchmark.rows)}
        return Loaded(task_manager().load([{"task": benchmark.task, **CHOICE, **shots, **_with(rows)}])["tasks"])
    if key in SOURCES:
        return _of_sources(benchmark, key, shots)
    return _of_lm_eval(benchmark, shots)


def _of_sources(benchmark: Harness, key: str, shots: dict[str, int]) -> Loaded:
    index = task_manager().task_index
    test = rows_of(key, benchmark.data, "validation" if benchmark.validation else "test")
    dev = rows_of(key, benchmark.data, "dev") if benchmark.shots else ()
    members = []
    for name in _leaves(benchmark.task):
        subject = (index[name].cfg or {}).get("dataset_name")
        rows = {"test": _about(subject, test), "dev": _about(subject, dev)}
        if rows["test"]:
            members.append({"task": name, **shots, **_with(rows)})
    if not members:
        raise UserError(
            f"eval.data.{key}={benchmark.data} has none of the subjects of {benchmark.task}: "
            f"{', '.join(name.removeprefix('mmlu_') for name in _leaves(benchmark.task))}"
        )
    # In a group, so that each is lm-eval's own with what is given here instead.
    tasks = task_manager().load([{"group": benchmark.name, "task": members}])["tasks"]
    aggregates = (index[benchmark.task].cfg or {}).get("aggregate_metric_list") or []
    return Loaded(tasks, by_size=all(one.get("weight_by_size", True) for one in aggregates))


def _leaves(name: str) -> list[str]:
    """The tasks of a task, group or tag, by name."""
    manager = task_manager()
    entry = manager.task_index[name]
    if name in manager.all_tags:
        return sorted(entry.tags)
    if name in manager.all_groups:
        return [leaf for member in (entry.cfg or {})["task"] for leaf in _leaves(member)]
    return [name]


def _about(subject: str | None, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of MMLU's rows that are about a subject; of another benchmark, all."""
    return [row for row in rows if row.get("subject", subject) == subject]


def _with(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What makes a task of lm-eval read these rows, by split, instead of its data set."""
    there = {split: datasets.Dataset.from_list(of_split) for split, of_split in rows.items() if of_split}
    return {
        "custom_dataset": lambda **_: datasets.DatasetDict(there),
        "dataset_kwargs": None,
        "test_split": "test",
        "validation_split": None,
        "training_split": None,
        "fewshot_split": "dev" if "dev" in there else None,
    }


def _of_lm_eval(benchmark: Harness, shots: dict[str, int]) -> Loaded:
    """Any other task of lm-eval, with the data that it names itself."""
    manager = task_manager(everything=True)
    name = benchmark.task
    if name not in manager.all_tasks:
        raise UserError(f"lm-eval has no task {name}.{did_you_mean(name, manager.all_tasks)} All: lm-eval ls tasks")
    if benchmark.data or benchmark.validation:
        raise UserError(
            f"{name} is asked as lm-eval has it, with its own data and its test set; local files and a validation set "
            f"are for {', '.join(SOURCES)}"
        )
    datasets.disable_progress_bars()
    try:
        loaded = manager.load([name])
    except Exception as error:  # of the hub's client, of a task's own code, of a package that it needs
        raise UserError(
            f"lm-eval's task {name} can't be loaded ({type(error).__name__}: {str(error).splitlines()[0][:200]}). On a "
            f"machine with internet, the same command keeps its data in the cache of `datasets`"
        ) from error
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", shots.get("num_fewshot", task.get_config("num_fewshot") or 0))
    aggregates = [one for group in loaded["groups"].values() for one in group.aggregate_metric_list or ()]
    return Loaded(loaded["tasks"], by_size=all(one.weight_by_size for one in aggregates))


# ---------------------------------------------------------------------------------------------------
# The model


class InMemory(HFLM):
    """The model in memory, asked with the tokens that it is trained with: the start token where there is one, no end.

    With `shared`, each process of the run asks its part. Under ZeRO 3 every forward pass needs all of them, so that
    each has as many.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, room: int | None, shared: bool):
        self.shared = shared and distributed.size() > 1
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, max_length=room)
        self.bar: Bar | None = None
        self.cut: set[str] = set()  # prompts that were too long

    @property
    def rank(self) -> int:
        return distributed.rank() if self.shared else 0

    @property
    def world_size(self) -> int:
        return distributed.size() if self.shared else 1

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.tensor(distributed.gather(tensor.tolist()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        parts = distributed.gather(obj)
        return parts if self.rank == dst else None

    def barrier(self) -> None:
        distributed.barrier()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return self.tokenizer(string, add_special_tokens=False).input_ids
        return prompt_tokens(self.tokenizer, string)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, each (prompts, longest), padded on the left."""
        encoded = [self.tok_encode(string) for string in strings]
        longest = left_truncate_len or max(map(len, encoded))
        self.cut.update(string for string, ids in zip(strings, encoded) if len(ids) > longest)
        encoded = [ids[-longest:] for ids in encoded]
        width = max(map(len, encoded))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded])
        return ids, torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        for request, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"an answer of {len(continuation)} tokens does not fit the {self.max_length} positions that the "
                    f"model has for it: {request[1][:60]!r}"
                )
            if request and len(context) + len(continuation) > self.max_length + 1:
                self.cut.add(request[0])
        longest = min(max(len(context) + len(continuation) for _, context, continuation in requests), self.max_length)
        longest = max(distributed.gather(longest)) if self.shared else longest
        vocabulary = self.config.get_text_config().vocab_size
        self.batch_size_per_gpu = max(1, min(BATCH, LOGITS // (longest * vocabulary)))
        # What differs in the last token alone is one row of a forward pass.
        passes = len({tuple(context + continuation[:-1]) for _, context, continuation in requests})
        batches = math.ceil(passes / self.batch_size_per_gpu)
        most = max(distributed.gather(batches)) if self.shared else batches  # now: later, the others may need this one
        with self._progress(passes):
            likelihoods = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            for _ in range(most - batches):
                super()._model_call(torch.tensor([[self.prefix_token_id]], device=self.device))
        return likelihoods

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        with self._progress(len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        if self.bar:
            self.bar.advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = super()._model_generate(context, *args, **kwargs)
        if self.bar:
            self.bar.advance(len(context))
        return tokens

    @contextmanager
    def _progress(self, total: int) -> Iterator[None]:
        with Bar("lm-eval", total) as self.bar:
            yield
        self.bar = None


@untouched_random_state()
@torch.no_grad()
def run_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, benchmark: Harness, room: int | None
) -> Scores:
    """Measure a model by one of lm-eval's tasks or groups.

    Args:
        room: tokens that prompt and answer together may have; None for a model without a limit.
    """
    loaded = tasks_of(benchmark)
    fewest = min(len(task.eval_docs) for task in loaded.tasks.values())
    shared = min(fewest, benchmark.limit or fewest) >= distributed.size()
    was_training = model.training
    lm = InMemory(model, tokenizer, room, shared)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(0)
    found = ask_all(lm, {"tasks": loaded.tasks}, limit=benchmark.limit, bootstrap_iters=0)
    model.train(was_training)
    cut = set().union(*distributed.gather(lm.cut))
    samples = distributed.from_main(_samples(benchmark, loaded, found["samples"], cut) if found else None)
    return scored(samples)


def refuse_no_room_for_answers(benchmark: Harness, room: int | None) -> None:
    """Raises UserError where the model's positions have no room for the answers that the benchmark asks for."""
    for task in tasks_of(benchmark).tasks.values():
        longest = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", 0)
        if room is not None and longest >= room:
            raise UserError(
                f"{benchmark.name} allows answers of {longest} tokens, and the model has {room} positions for prompt "
                f"and answer together. A model with more of them can be asked, or other benchmarks"
            )


def _samples(
    benchmark: Harness, loaded: Loaded, found: dict[str, list[dict[str, Any]]], cut: set[str]
) -> list[dict[str, Any]]:
    """lm-eval's samples in our form, in their order, with the metrics that the benchmark asks for."""
    rows = []
    for name, task in loaded.tasks.items():
        aggregations = {metric: _aggregation(name, function) for metric, function in task.aggregation().items()}
        first = task.get_config("filter_list")[0]["name"] if task.get_config("filter_list") else "none"
        for sample in sorted(found[name], key=lambda sample: sample["doc_id"]):
            if sample["filter"] != first:
                continue
            metrics = {}
            for metric in [benchmark.metric] if benchmark.metric else sample["metrics"]:
                value, aggregation = _plain(sample[metric]), aggregations[metric]
                if aggregation == "mean" and not loaded.by_size:
                    value, aggregation = [name, value], "mean_of_means"
                shown = benchmark.name if metric == benchmark.metric else f"{benchmark.name}_{metric}"
                metrics[shown] = value if aggregation == "mean" else {aggregation: value}
            prompt = str(sample["arguments"][0][0])
            gold, answer = _gold_and_answer(task, sample)
            row = {"benchmark": benchmark.name, "task": name, "prompt": prompt, "gold": gold, "answer": answer}
            rows.append(row | {"metrics": metrics} | ({"cut": True} if prompt in cut else {}))
    return rows


def _aggregation(task: str, function: Any) -> str:
    """The name that lm-eval's registry has for an aggregation."""
    for name, registered in AGGREGATION_REGISTRY.items():
        if registered is function:
            return str(name)
    raise UserError(f"lm-eval's task {task} aggregates by code of its own, which is not supported here")


def _plain(value: Any) -> Any:
    """Without numpy's numbers, which JSON has not."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def _gold_and_answer(task: Any, sample: dict[str, Any]) -> tuple[Any, Any]:
    """What was right and what was answered, as texts: of several options, the most likely."""
    gold, answers = sample["target"], sample["filtered_resps"]
    if task.OUTPUT_TYPE != "multiple_choice":
        return gold, answers[0]
    options = task.doc_to_choice(sample["doc"])
    best = max(range(len(options)), key=lambda index: answers[index][0])
    return options[gold] if isinstance(gold, int) else gold, options[best]
