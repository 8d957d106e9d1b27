"""UUID pairs: a function of the seed, tokenised with the loss on the value alone, scored by character."""

import re

import pytest
from transformers import ByT5Tokenizer

from mora_repro.data.task import IGNORED
from mora_repro.data.uuid import Uuid
from mora_repro.errors import UserError

VERSION_4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def task(pairs: int = 20, seed: int = 0, copy_key: bool = False) -> Uuid:
    return Uuid(name="uuid", title="UUID", metric="char_accuracy", pairs=pairs, seed=seed, copy_key=copy_key)


def test_pairs_are_random_uuids_and_a_function_of_the_seed():
    pairs = task().pairs_to_train()
    assert pairs == task().pairs_to_train() == task().questions()
    assert pairs[:5] == task(pairs=5).pairs_to_train()
    texts = [text for key, value in pairs for text in (key.removesuffix(":"), value)]
    assert all(VERSION_4.fullmatch(text) for text in texts) and len(set(texts)) == 40
    assert not set(texts) & {text for pair in task(seed=1).pairs_to_train() for text in pair}


def test_copying_asks_uuids_that_are_not_trained_on():
    copying = task(copy_key=True)
    assert all(prompt == f"{answer}:" for prompt, answer in copying.pairs_to_train() + copying.questions())
    assert not set(copying.pairs_to_train()) & set(copying.questions())


def test_the_loss_is_on_the_value_and_the_end_token_alone():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    made = task(pairs=3)
    data = made.training_set(tokenizer, max_length=1024)
    assert (len(data.examples), data.truncated, data.dropped) == (3, 0, 0)
    assert data.tokens == 3 * (37 + 36 + 1)
    for example, (prompt, value) in zip(data.examples, made.pairs_to_train(), strict=True):
        trained = [label for label in example.labels if label != IGNORED]
        assert trained == [*tokenizer(value, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == prompt + value
        assert example.labels[:37] == [IGNORED] * 37 and example.input_ids[37:] == example.labels[37:]


def test_cut_samples_are_counted_and_those_with_nothing_to_train_dropped():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    data = task(pairs=3).training_set(tokenizer, max_length=40)
    assert (len(data.examples), data.truncated, data.dropped) == (3, 3, 0)
    assert all(len(example.input_ids) == len(example.labels) == 40 for example in data.examples)
    with pytest.raises(UserError, match=r"training.max_length=37.*training.max_length=148"):
        task(pairs=3).training_set(tokenizer, max_length=37)


def test_the_fingerprint_covers_every_token():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    prints = {
        task(seed=seed, pairs=pairs).training_set(tokenizer, 1024).fingerprint for seed in (0, 1) for pairs in (3, 4)
    }
    assert len(prints) == 4
    assert task(pairs=3).training_set(tokenizer, 1024).fingerprint in prints


def test_score_counts_right_characters_at_their_place():
    made = task(pairs=2)
    first, second = (value for _, value in made.questions())
    assert made.score([first, second]) == {"char_accuracy": 100, "exact": 100}
    assert made.score([first, ""]) == {"char_accuracy": 50, "exact": 50}
    assert made.score([first[:9], "x" + second])["exact"] == 0
    shifted = sum(a == b for a, b in zip("x" + second, second))
    assert made.score(["", "x" + second])["char_accuracy"] == pytest.approx(100 * shifted / 72)
    assert made.score([first + "more", second])["char_accuracy"] == 100
    assert made.score([first + "more", second])["exact"] == 50


def test_an_answer_may_be_as_long_as_the_longest_value_and_its_end():
    assert task().longest_answer(ByT5Tokenizer(extra_ids=0)) == 37
