"""All benchmarks of a task, each measured in its way."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.benchmarks import Benchmark, Harness, Questions, Scores
from .generation import ask, prompt_room, room_for_text
from .perplexity import perplexity
from .scores import together


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Sequence[Benchmark],
    max_length: int,
    mean_of: Sequence[str] = (),
) -> Scores:
    """Measure a model by each benchmark; held-out texts in blocks of `max_length` tokens, as it was trained, or of
    as many as it has positions.

    Every process of a run calls this, and has the scores of the whole.
    """
    return together([_measure(model, tokenizer, benchmark, max_length) for benchmark in benchmarks], mean_of)


def _measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, benchmark: Benchmark, max_length: int
) -> Scores:
    if isinstance(benchmark, Questions):
        return ask(model, tokenizer, benchmark)
    if isinstance(benchmark, Harness):
        from .harness import run_harness  # lm-eval takes seconds, and many runs need none of it

        return run_harness(model, tokenizer, benchmark, room_for_text(model))
    room = room_for_text(model)
    return perplexity(model, tokenizer, benchmark, max_length if room is None else min(max_length, room))


def refuse_no_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, benchmarks: Sequence[Benchmark]) -> None:
    """Raises UserError where a benchmark's answers do not fit the model's positions: before a training, not after."""
    for benchmark in benchmarks:
        if isinstance(benchmark, Questions):
            prompt_room(model, benchmark, benchmark.longest(tokenizer))
        elif isinstance(benchmark, Harness):
            from .harness import refuse_no_room_for_answers

            refuse_no_room_for_answers(benchmark, room_for_text(model))


def fetch(benchmarks: Sequence[Benchmark]) -> None:
    """Have all data of the benchmarks here: downloads what is in no cache, and does nothing a second time.

    Raises UserError: data that can't be had or read.
    """
    for benchmark in benchmarks:
        if isinstance(benchmark, Harness):
            from .harness import tasks_of

            tasks_of(benchmark)
