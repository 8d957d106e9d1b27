"""All benchmarks of a task, each measured in its way."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.benchmarks import Benchmark, Harness, Questions, Scores
from .generation import ask, prompt_room
from .harness import run_harness
from .scores import together


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Sequence[Benchmark],
    mean_of: Sequence[str] = (),
) -> Scores:
    """Measure a model by each benchmark. Every process of a run calls this, and has the scores of the whole."""
    return together([_measure(model, tokenizer, benchmark) for benchmark in benchmarks], mean_of)


def _measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, benchmark: Benchmark) -> Scores:
    if isinstance(benchmark, Questions):
        return ask(model, tokenizer, benchmark)
    if isinstance(benchmark, Harness):
        return run_harness(model, tokenizer, benchmark)
    raise NotImplementedError(benchmark)


def refuse_no_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, benchmarks: Sequence[Benchmark]) -> None:
    """Raises UserError where a benchmark's answers do not fit the model's positions: before a training, not after."""
    for benchmark in benchmarks:
        if isinstance(benchmark, Questions):
            prompt_room(model, benchmark, benchmark.longest(tokenizer))
