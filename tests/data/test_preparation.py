"""Samples become token ids: the loss on what is trained alone, cut ones counted, empty ones dropped."""

import pytest
from tiny import TINY
from transformers import ByT5Tokenizer

from mora_repro.data.preparation import prepare
from mora_repro.data.shards import TrainingSet
from mora_repro.data.task import IGNORED, build_task
from mora_repro.errors import UserError
from mora_repro.spec import RunSpec, compose_config

TOKENIZER = ByT5Tokenizer(extra_ids=0)


@pytest.fixture
def prepared(tmp_path):
    def made(*overrides: str) -> TrainingSet:
        spec = RunSpec.from_config(compose_config([*TINY, "task.pairs=3", *overrides]))
        return prepare(spec, build_task(spec), TOKENIZER, tmp_path)

    return made


def test_the_loss_is_on_the_value_and_the_end_token_alone(prepared):
    data = prepared()
    pairs = build_task(RunSpec.from_config(compose_config([*TINY, "task.pairs=3"]))).pairs_to_train()
    assert (len(data), data.truncated, data.dropped) == (3, 0, 0)
    assert data.tokens == 3 * (37 + 36 + 1)
    for example, (prompt, value) in zip([data[i] for i in range(3)], pairs, strict=True):
        trained = [label for label in example.labels if label != IGNORED]
        assert trained == [*TOKENIZER(value, add_special_tokens=False).input_ids, TOKENIZER.eos_token_id]
        assert TOKENIZER.decode(example.input_ids, skip_special_tokens=True) == prompt + value
        assert example.labels[:37] == [IGNORED] * 37 and example.input_ids[37:] == example.labels[37:]


def test_cut_samples_are_counted_and_those_with_nothing_to_train_dropped(prepared):
    data = prepared("training.max_length=40")
    assert (len(data), data.truncated, data.dropped) == (3, 3, 0)
    assert all(len(data[i].input_ids) == len(data[i].labels) == 40 for i in range(3))
    with pytest.raises(UserError, match=r"training.max_length=37.*training.max_length=148"):
        prepared("training.max_length=37")


def test_the_fingerprint_covers_every_token(prepared):
    prints = {prepared(f"seed={seed}", f"task.pairs={pairs}").fingerprint for seed in (0, 1) for pairs in (3, 4)}
    assert len(prints) == 4 and prepared().fingerprint in prints
