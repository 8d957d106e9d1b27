"""All benchmarks of a task, each measured in its way."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.benchmarks import Benchmark, Harness, Questions, Scores
from .generation import ask, prompt_room
from .harness import run_harness
from .perplexity import perplexity
from .scores import together


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Sequence[Benchmark],
    max_length: int,
    mean_of: Sequence[str] = (),
) -> Scores:
    """Measure a model by each benchmark; held-out texts in blocks of `max_length` tokens, as it was trained.

    Every process of a run calls this, and has the scores of the whole.
    """
    return together([_measure(model, tokenizer, benchmark, max_length) for benchmark in benchmarks], mean_of)


def _measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, benchmark: Benchmark, max_length: int
) -> Scores:
    if isinstance(benchmark, Questions):
        return ask(model, tokenizer, benchmark)
    if isinstance(benchmark, Harness):
        return run_harness(model, tokenizer, benchmark)
    return perplexity(model, tokenizer, benchmark, max_length)


def refuse_no_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, benchmarks: Sequence[Benchmark]) -> None:
    """Raises UserError where a benchmark's answers do not fit the model's positions: before a training, not after."""
    for benchmark in benchmarks:
        if isinstance(benchmark, Questions):
            prompt_room(model, benchmark, benchmark.longest(tokenizer))
