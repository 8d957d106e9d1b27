"""UUID pairs: a function of the seed, tokenised with the loss on the value alone, scored by character."""

import re

from transformers import ByT5Tokenizer

from mora_repro.data.task import pair
from mora_repro.data.uuid import Uuid, score
from mora_repro.spec.run_spec import Eval

VERSION_4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def task(pairs: int = 20, seed: int = 0, copy_key: bool = False) -> Uuid:
    return Uuid(name="uuid", title="UUID", metric="char_accuracy", pairs=pairs, seed=seed, copy_key=copy_key)


def asked(task: Uuid) -> list[tuple[str, str]]:
    [questions] = task.benchmarks(Eval())
    return questions.pairs


def test_pairs_are_random_uuids_and_a_function_of_the_seed():
    pairs = task().pairs_to_train()
    assert pairs == task().pairs_to_train() == asked(task())
    assert pairs[:5] == task(pairs=5).pairs_to_train()
    texts = [text for key, value in pairs for text in (key.removesuffix(":"), value)]
    assert all(VERSION_4.fullmatch(text) for text in texts) and len(set(texts)) == 40
    assert not set(texts) & {text for pair in task(seed=1).pairs_to_train() for text in pair}


def test_copying_asks_uuids_that_are_not_trained_on():
    copying = task(copy_key=True)
    assert all(prompt == f"{answer}:" for prompt, answer in copying.pairs_to_train() + asked(copying))
    assert not set(copying.pairs_to_train()) & set(asked(copying))


def test_a_sample_is_a_key_and_its_value():
    assert list(task().samples()) == [pair(*texts) for texts in task().pairs_to_train()]


def test_score_counts_right_characters_at_their_place():
    first, second = (value for _, value in asked(task(pairs=2)))
    assert score(first, first) == {"char_accuracy": (36, 36), "exact": (1, 1)}
    assert score("", first) == {"char_accuracy": (0, 36), "exact": (0, 1)}
    shifted = sum(a == b for a, b in zip("x" + second, second))
    assert score("x" + second, second) == {"char_accuracy": (shifted, 36), "exact": (0, 1)}
    assert score(first + "more", first) == {"char_accuracy": (36, 36), "exact": (0, 1)}


def test_an_answer_may_be_as_long_as_the_longest_value_and_its_end():
    [questions] = task().benchmarks(Eval())
    assert questions.longest(ByT5Tokenizer(extra_ids=0)) == 37
