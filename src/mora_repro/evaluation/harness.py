"""lm-eval in process, on the model in memory."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.benchmarks import Harness, Scores
from .scores import of_points

# The form of the rows of a benchmark that a task generates: that of the AdaptLLM sets.
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{input}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{gold_index}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}


@torch.no_grad()
def run_harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, benchmark: Harness) -> Scores:
    """Measure a model by one of lm-eval's tasks."""
    from lm_eval import simple_evaluate  # seconds, and many runs need none of it
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    was_training = model.training
    model.eval()
    rows = list(benchmark.rows or [])
    config = {
        "task": benchmark.task,
        "custom_dataset": lambda **_: datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}),
        **CHOICE,
    }
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=64, device=str(model.device)),
        tasks=[config],
        num_fewshot=benchmark.shots,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    model.train(was_training)
    samples = found["samples"][benchmark.task]
    scores = of_points([{benchmark.name: (sample[benchmark.metric], 1)} for sample in samples])
    for sample in samples:
        gold = sample["doc"]["options"][sample["doc"]["gold_index"]]
        best = max(range(len(sample["filtered_resps"])), key=lambda index: sample["filtered_resps"][index][0])
        row = {"benchmark": benchmark.name, "prompt": sample["doc"]["input"], "gold": gold}
        scores.samples.append(
            row | {"answer": sample["doc"]["options"][best], benchmark.name: sample[benchmark.metric]}
        )
    return scores
