"""Batched greedy generation equals generation one by one, token by token."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    ByT5Tokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from mora_repro.data.benchmarks import Questions
from mora_repro.data.task import prompt_tokens
from mora_repro.errors import UserError
from mora_repro.evaluation import answer, evaluate, refuse_no_room


@pytest.fixture(scope="module")
def tokenizer():
    return ByT5Tokenizer(extra_ids=0)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).train()


@torch.no_grad()
def greedy(model, tokenizer, prompt: list[int], count: int) -> str:
    """No cache, no padding, no library."""
    model.eval()
    ids = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    model.train()
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_answers_in_batches_equal_answers_one_by_one_in_their_order(model, tokenizer, monkeypatch):
    monkeypatch.setattr("mora_repro.evaluation.generation.BATCH", 3)
    prompts = [prompt_tokens(tokenizer, text) for text in ("one:", "a longer prompt:", "x", "seven of nine", "ab")]
    expected = [greedy(model, tokenizer, prompt, 8) for prompt in prompts]
    assert len(set(expected)) > 1
    assert answer(model, tokenizer, prompts, 8) == expected
    assert model.training


def test_answers_are_greedy_whatever_the_model_ships(model, tokenizer):
    prompts = [prompt_tokens(tokenizer, "one:")]
    expected = answer(model, tokenizer, prompts, 12)
    shipped = GenerationConfig(repetition_penalty=5.0, min_new_tokens=12, no_repeat_ngram_size=1)
    model.generation_config, own = shipped, model.generation_config
    assert answer(model, tokenizer, prompts, 12) == expected and model.generation_config is shipped
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert answer(adapted, tokenizer, prompts, 12) == expected
    model.generation_config = own


def echo(length: int, longest: int = 4) -> Questions:
    """A prompt of a given length and a short one, scored by the number of answers."""
    pairs = [("q" * length, "a"), ("short", "b")]
    return Questions("echo", pairs, lambda answer, gold: {"answers": (1, 1)}, lambda tokenizer: longest)


def test_a_model_without_a_limit_of_positions_is_asked_too(tokenizer):
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)
    assert evaluate(BloomForCausalLM(config), tokenizer, [echo(200)], 64).metrics == {"answers": 100}


@pytest.mark.parametrize(("length", "cut"), [(60, 0), (61, 1), (200, 1)])
def test_a_prompt_beyond_the_positions_is_cut_and_counted(model, tokenizer, length, cut):
    metrics = evaluate(model, tokenizer, [echo(length)], 64).metrics
    assert metrics["answers"] == 100 and metrics.get("cut_prompts", 0) == cut


def test_answers_that_leave_no_room_for_a_prompt_are_refused(model, tokenizer):
    with pytest.raises(UserError, match=r"answers of 64 tokens.*64 positions.*task.max_new_tokens=16"):
        refuse_no_room(model, tokenizer, [echo(3, longest=64)])


def test_every_sample_is_kept_with_its_points_and_the_standard_error_is_that_of_the_shares(model, tokenizer):
    pairs = [("one:", "x"), ("a longer prompt:", "yy"), ("seven", "zzzz")]
    points = {"x": 1, "yy": 1, "zzzz": 1}
    questions = Questions("q", pairs, lambda answer, gold: {"m": (points[gold], len(gold))}, lambda tokenizer: 4)
    scores = evaluate(model, tokenizer, [questions], 64)
    assert scores.metrics == {"m": pytest.approx(100 * 3 / 7)} and scores.counts == {"m": 3}
    assert scores.stderr["m"] == pytest.approx(100 * stats.sem([1, 1 / 2, 1 / 4]))
    assert [(row["prompt"], row["gold"], row["metrics"]["m"]) for row in scores.samples] == [
        ("one:", "x", [1, 1]),
        ("a longer prompt:", "yy", [1, 2]),
        ("seven", "zzzz", [1, 4]),
    ]
    expected = [answer(model, tokenizer, [prompt_tokens(tokenizer, prompt)], 4)[0] for prompt, _ in pairs]
    assert [row["answer"] for row in scores.samples] == expected
