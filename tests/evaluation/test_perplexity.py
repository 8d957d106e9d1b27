"""Perplexity of held-out texts: that of each document alone, whatever the blocks, with the error of a ratio."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig

from mora_repro.data.benchmarks import HeldOut
from mora_repro.errors import UserError
from mora_repro.evaluation import evaluate
from mora_repro.evaluation import perplexity as module
from mora_repro.evaluation.perplexity import perplexity

TOKENIZER = ByT5Tokenizer(extra_ids=0)
TEXTS = ["one", "another text", "the third is longer", "last", "x" * 11]


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=259, initializer_range=0.5, **sizes))


def test_it_is_that_of_the_documents_alone():
    network = model()
    scores = perplexity(network, TOKENIZER, HeldOut("held_out", TEXTS), 1000)
    losses = []
    for text in TEXTS:
        ids = torch.tensor([[*TOKENIZER(text, add_special_tokens=False).input_ids, TOKENIZER.eos_token_id]])
        logits = network(input_ids=ids).logits
        losses += cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    assert scores.metrics["held_out"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert scores.counts == {"held_out": 1} and scores.stderr == {}
    assert scores.samples[0]["tokens"] == len(losses) == sum(map(len, TEXTS))
    assert network.training


def test_blocks_are_measured_alike_in_batches_of_any_size(monkeypatch):
    network, held_out = model(), HeldOut("held_out", TEXTS)
    many = perplexity(network, TOKENIZER, held_out, 8)
    monkeypatch.setattr(module, "BATCH", 16)
    few = perplexity(network, TOKENIZER, held_out, 8)
    assert few.metrics == pytest.approx(many.metrics) and few.stderr == pytest.approx(many.stderr)
    assert many.counts == {"held_out": math.ceil(sum(len(text) + 1 for text in TEXTS) / 8)}
    assert sum(row["loss"] for row in many.samples) / sum(row["tokens"] for row in many.samples) == pytest.approx(
        math.log(many.metrics["held_out"])
    )


def test_the_error_is_what_repeated_samples_of_blocks_vary_by():
    scores = perplexity(model(), TOKENIZER, HeldOut("held_out", TEXTS * 10), 8)
    rows = torch.tensor([[row["loss"], row["tokens"]] for row in scores.samples], dtype=torch.double)
    dice = torch.Generator().manual_seed(0)
    draws = rows[torch.randint(len(rows), (4000, len(rows)), generator=dice)].sum(1)
    assert scores.stderr["held_out"] == pytest.approx((draws[:, 0] / draws[:, 1]).exp().std().item(), rel=0.1)


def test_blocks_are_no_longer_than_the_model_has_positions():
    network = model()
    network.config.max_position_embeddings = 8
    scores = evaluate(network, TOKENIZER, [HeldOut("held_out", TEXTS)], 1000)
    assert scores == perplexity(network, TOKENIZER, HeldOut("held_out", TEXTS), 8)


def test_without_a_text_there_is_an_error():
    with pytest.raises(UserError, match=r"held_out has no held-out text"):
        perplexity(model(), TOKENIZER, HeldOut("held_out", []), 8)
