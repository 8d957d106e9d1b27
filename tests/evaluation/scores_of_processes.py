"""Run by test_harness.py in one or more processes: scores of a tiny model, whole or in shards of ZeRO 3.

python scores_of_processes.py <ZeRO stage> <folder of the model> <result.json>
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tiny_model import tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from mora_repro import distributed
from mora_repro.data.benchmarks import Benchmark, Harness, Questions, known
from mora_repro.evaluation import evaluate, harness
from mora_repro.spec.run_spec import Eval
from mora_repro.training import load_extensions


def benchmarks() -> list[Benchmark]:
    """Of every kind: choices with answers of one token and of several, written answers, own generation."""
    texts = [f"question {number} {'of many ' * (number % 5)}:" for number in range(7)]
    choices = [
        {"input": text, "options": ["a", "b", "a longer one"][: 2 + index % 2], "gold_index": index % 2}
        for index, text in enumerate(texts)
    ]
    examples = Path(__file__).parents[2] / "src" / "mora_repro" / "evaluation" / "examples"
    data = {name: str(examples / name) for name in ("ner", "convfinqa")}
    return [
        Harness("choices", "choices", rows=choices),
        Harness("one", "one", rows=choices[:1]),  # fewer than processes
        *known("ner", Eval(data=data)),
        *known("convfinqa", Eval(data=data)),
        Questions(
            "own", [(text, "x") for text in texts[:5]], lambda answer, _: {"own": (len(answer), 64)}, lambda _: 8
        ),
    ]


def main(stage: int, folder: str, result: str) -> None:
    harness.BATCH = 2  # so that the processes have different numbers of batches of their own
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    if stage:
        load_extensions()
    if stage or distributed.size() > 1:
        distributed.join(deepspeed=stage > 0)
    sharded = HfDeepSpeedConfig(config) if stage == 3 else None  # kept, as long as the model is loaded
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    if sharded:
        import deepspeed

        deepspeed.initialize(model=model, config=config)
        assert next(model.parameters()).ds_tensor.numel() < model.config.vocab_size * model.config.hidden_size
    scores = evaluate(model, tiny_tokenizer(), benchmarks(), 64)
    everyones = distributed.gather((scores.metrics, scores.samples))
    assert all(one == everyones[0] for one in everyones)
    if distributed.is_main():
        Path(result).write_text(json.dumps([scores.metrics, scores.stderr, scores.counts, scores.samples]))
    if stage or distributed.size() > 1:
        distributed.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
