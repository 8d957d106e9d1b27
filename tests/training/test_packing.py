"""Documents in one block do not see each other, in every trainer and kind of attention."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed import PACKED
from processes import launcher
from run_outcome import only_record
from tiny import ROOT
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig

from mora_repro.data.shards import blocks_of
from mora_repro.data.task import document
from mora_repro.data.tokens import Tokeniser
from mora_repro.training import Collator, build_extensions

TOKENIZER = ByT5Tokenizer(extra_ids=0)
TEXTS = ["one", "another text", "", "the third", "x" * 30, "last"]


def model(attention: str):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def blocks():
    return blocks_of(Tokeniser(TOKENIZER).all(map(document, TEXTS)), 16, TOKENIZER.pad_token_id)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("flat", [False, True])
def test_the_logits_of_a_packed_document_are_those_of_it_alone(attention, flat):
    network = model(attention)
    batch = Collator(TOKENIZER.pad_token_id, flat)(blocks())
    assert batch["input_ids"].shape == ((1, 64) if flat else (4, 16))
    batch.pop("labels")
    logits = network(**batch).logits.view(4, 16, -1)
    for ids, positions, row in zip(batch["input_ids"].view(4, 16), batch["position_ids"].view(4, 16), logits):
        starts = [*(positions == 0).nonzero().flatten().tolist(), 16]
        assert starts[0] == 0
        for start, end in itertools.pairwise(starts):
            alone = network(input_ids=ids[start:end][None]).logits[0]
            torch.testing.assert_close(row[start:end], alone, atol=1e-6, rtol=0)


def corpus(folder: Path) -> Path:
    """Documents of 1 to 60 letters, a word over and over."""
    dice = random.Random(0)
    texts = [dice.choice("abcdef") * dice.randint(1, 60) + str(number) for number in range(60)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder / "train.jsonl"


def train(processes: int, out: Path, *overrides: str) -> str:
    program = ["train.py", *PACKED, f"+task.data={corpus(out.parent)}", f"out={out}", *overrides]
    command = [sys.executable, *(launcher(processes) if processes > 1 else []), *program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


@pytest.mark.slow
def test_blocks_are_trained_on_alike_under_every_trainer(tmp_path):
    build_extensions()
    train(1, tmp_path / "plain", "method=mora")
    one = only_record(tmp_path / "plain")
    assert one.curve.loss[-1] < one.curve.loss[0] and one.metrics["perplexity"] > 1
    assert one.evaluations[-1].counts["perplexity"] > 1 and one.evaluations[-1].stderr["perplexity"] > 0
    for trainer in ("ddp", "zero2", "zero3"):
        how = [f"trainer={trainer}", "trainer.processes=2", "trainer.gradient_checkpointing=true"]
        train(2, tmp_path / trainer, "method=mora", *how)
        other = only_record(tmp_path / trainer)
        assert other.curve.loss == pytest.approx(one.curve.loss, abs=5e-6), trainer
        assert other.metrics == pytest.approx(one.metrics, rel=1e-5) and other.data == one.data
        assert [e.stderr for e in other.evaluations] == [pytest.approx(e.stderr, rel=1e-4) for e in one.evaluations]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_methods_that_take_no_positions_say_that_documents_see_each_other(tmp_path, method):
    said = train(1, tmp_path / "out", f"method={method}", "r=2")
    assert "the documents of a block see each other" in said and "Traceback" not in said
    assert only_record(tmp_path / "out").status == "finished"
