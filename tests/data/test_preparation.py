"""Samples become token ids on disk: the loss on what is trained alone, all that is left out counted, made once."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed import PACKED
from processes import is_running
from tiny import ROOT, TINY
from transformers import ByT5Tokenizer

from mora_repro.data import shards, tokens
from mora_repro.data.preparation import prepare
from mora_repro.data.shards import TrainingSet, blocks_of
from mora_repro.data.task import IGNORED, Segment, build_task, document, pair
from mora_repro.data.tokens import Tokeniser, tokenise
from mora_repro.errors import UserError
from mora_repro.methods.base import byte_pairs
from mora_repro.prepare import as_text
from mora_repro.spec import RunSpec, compose_config

TOKENIZER = ByT5Tokenizer(extra_ids=0)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "and",
    "runs",
    "away",
    "from",
    "all",
    "that",
    "it",
    "has",
    "seen",
]


def specified(*overrides: str) -> RunSpec:
    return RunSpec.from_config(compose_config([*TINY, "task.pairs=3", *overrides]))


@pytest.fixture
def prepared(tmp_path):
    def made(*overrides: str, spec: RunSpec | None = None) -> TrainingSet:
        spec = spec or specified(*overrides)
        return prepare(spec, build_task(spec), TOKENIZER, tmp_path)

    return made


def corpus(folder: Path, texts: list[str]) -> list[str]:
    """The overrides of a task of documents."""
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [*PACKED, f"+task.data={folder / 'train.jsonl'}"]


def documents(count: int) -> list[str]:
    dice = random.Random(0)
    return [" ".join(dice.choices(WORDS, k=dice.randint(1, 30))) for _ in range(count)]


def test_the_loss_is_on_the_value_and_the_end_token_alone(prepared):
    data = prepared()
    pairs = build_task(specified()).pairs_to_train()
    assert (len(data), data.truncated, data.dropped, data.skipped, data.overlap) == (3, 0, 0, 0, None)
    assert data.tokens == 3 * (37 + 36 + 1) and data.lengths == [74] * 3
    for example, (prompt, value) in zip([data[i] for i in range(3)], pairs, strict=True):
        trained = [label for label in example.labels if label != IGNORED]
        assert trained == [*TOKENIZER(value, add_special_tokens=False).input_ids, TOKENIZER.eos_token_id]
        assert TOKENIZER.decode(example.input_ids, skip_special_tokens=True) == prompt + value
        assert example.labels[:37] == [IGNORED] * 37 and example.input_ids[37:] == example.labels[37:]
        assert as_text(TOKENIZER, example) == f"{prompt}>>{value}</s><<"


def test_cut_samples_are_counted_and_those_with_nothing_to_train_dropped(prepared):
    data = prepared("training.max_length=40")
    assert (len(data), data.truncated, data.dropped) == (3, 3, 0)
    assert all(len(data[i].input_ids) == len(data[i].labels) == 40 for i in range(3))
    with pytest.raises(UserError, match=r"training.max_length=37.*training.max_length=148"):
        prepared("training.max_length=37")
    samples = [pair("a" * 30, "b"), pair("a" * 50, "b"), (), pair("a", "b" * 50)]
    made = Tokeniser(TOKENIZER, 40)(samples)
    assert (made.lengths, made.truncated, made.dropped, made.skipped) == ([32, 40], 2, 1, 1)


def test_segments_are_tokenised_by_themselves_with_an_end_where_they_have_one():
    sample = (Segment("ab", False), Segment("c", True, ends=True), Segment("d", False), Segment("e", True))
    [example] = tokenise(TOKENIZER, [sample])
    assert as_text(TOKENIZER, example) == "ab>>c</s><<d>>e<<"


def test_the_fingerprint_covers_every_token(prepared):
    prints = {prepared(f"seed={seed}", f"task.pairs={pairs}").fingerprint for seed in (0, 1) for pairs in (3, 4)}
    assert len(prints) == 4 and prepared().fingerprint in prints


def test_what_is_there_is_found_again_and_a_changed_input_is_prepared_anew(prepared, tmp_path):
    first = prepared(spec=RunSpec.from_config(compose_config(corpus(tmp_path, documents(40)))))
    made = (first.folder / "index.json").stat().st_mtime_ns
    again = prepared(spec=RunSpec.from_config(compose_config(corpus(tmp_path, documents(40)))))
    assert again.folder == first.folder and (again.folder / "index.json").stat().st_mtime_ns == made
    (tmp_path / "other").mkdir()
    changed = corpus(tmp_path / "other", documents(41))
    folders = {first.folder}
    for overrides in (changed, [*changed, "training.max_length=25"], [*changed, "task.overlapping=keep"]):
        overrides = [text.replace("task.overlapping", "+task.overlapping") for text in overrides]
        folders.add(prepared(spec=RunSpec.from_config(compose_config(overrides))).folder)
    assert len(folders) == 4


@pytest.mark.parametrize("harm", ["cut", "altered", "removed", "no index"])
def test_a_torn_or_altered_file_is_found_and_the_data_prepared_again(prepared, capsys, harm):
    first = prepared()
    examples = [first[index] for index in range(3)]
    path = first.folder / ("index.json" if harm == "no index" else "tokens-00000.npy")
    content = path.read_bytes()
    if harm in ("removed", "no index"):
        path.unlink()
    else:
        path.write_bytes(content[:-3] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    again = prepared()
    assert f"{path.name} is not as it was written" in capsys.readouterr().err
    assert path.read_bytes() == content and [again[index] for index in range(3)] == examples


def test_overlapping_samples_are_left_out_or_kept_and_counted(prepared, tmp_path):
    texts = [f"{' '.join(random.Random(number).sample(WORDS, 14))} {number}" for number in range(60)]
    lines = [*texts, *(f"{text} twice" for text in texts)]  # the second has the words of the first, and another place
    overrides = corpus(tmp_path, lines)
    dropped = prepared(spec=RunSpec.from_config(compose_config(overrides)))
    kept = prepared(spec=RunSpec.from_config(compose_config([*overrides, "+task.overlapping=keep"])))
    assert 20 < dropped.overlap == kept.overlap < 60
    assert kept.index.samples - dropped.index.samples == kept.overlap
    assert any("share 13 words in a row" in notice for notice in dropped.notices())


def test_a_limit_on_what_is_asked_does_not_limit_what_is_looked_for(prepared, tmp_path):
    words = {split: [" ".join(random.Random(f"{split} {n}").choices(WORDS, k=20)) for n in range(9)] for split in "ab"}
    for name, asked in (("train", words["a"] + words["b"][5:]), ("test", words["b"])):
        rows = [{"question": question, "answer": "#### 1"} for question in asked]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = (
        "task.prompt='Below is one long instruction that all prompts have, and the question follows it now: {question}'"
    )
    task = ["scale=mini", "method=fft", "task=gsm8k", "model.base=null", f"task.data={tmp_path}", prompt]
    made = [prepared(spec=RunSpec.from_config(compose_config([*task, *limit]))) for limit in ([], ["eval.limit=1"])]
    assert made[0].folder == made[1].folder and (len(made[0]), made[0].overlap) == (9, 4)


def test_a_block_is_shown_with_its_documents(prepared, tmp_path):
    data = prepared(spec=RunSpec.from_config(compose_config(corpus(tmp_path, ["first text", "second", "third", "d"]))))
    shown = as_text(TOKENIZER, data[0])
    assert shown.startswith("[document] ") and "</s><<\n[document] " in shown
    assert {len(data[index].input_ids) for index in range(len(data))} == {24}


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(2, 12), st.integers(1, 40))
def test_blocks_have_every_token_of_the_documents_once_and_in_order(tmp_path_factory, lengths, block, shard):
    texts = [chr(97 + number % 26) * length for number, length in enumerate(lengths)]
    parts = [Tokeniser(TOKENIZER)([document(text)]) for text in texts]
    folder = tmp_path_factory.mktemp("set") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", shard)
        index = shards.write(folder, parts, block, np.uint16, TOKENIZER.pad_token_id)
    data = TrainingSet(folder, index)
    blocks = [data[number] for number in range(len(data))]
    assert blocks == blocks_of(parts, block, TOKENIZER.pad_token_id)
    assert all(len(example.input_ids) == block for example in blocks)
    whole = [token for example in blocks for token in example.input_ids]
    filled = -sum(len(text) + 1 for text in texts) % block
    assert TOKENIZER.decode(whole[: len(whole) - filled]) == "".join(f"{text}</s>" for text in texts)
    assert whole[len(whole) - filled :] == [TOKENIZER.pad_token_id] * filled
    starts = {0, *itertools.accumulate(len(text) + 1 for text in texts)} | set(range(0, len(whole), block))
    starts -= {len(whole)}
    positions = [position for example in blocks for position in example.position_ids]
    assert {place for place, position in enumerate(positions) if position == 0} == starts
    assert all(after in (0, before + 1) for before, after in itertools.pairwise(positions))
    labels = [label for example in blocks for label in example.labels]
    trained = [place not in starts and place < len(whole) - filled for place in range(len(whole))]
    assert labels == [token if here else IGNORED for token, here in zip(whole, trained, strict=True)]


@pytest.mark.slow
def test_processes_give_what_one_gives(monkeypatch):
    samples = [document(text) if number % 7 else () for number, text in enumerate(documents(2000))]
    alone = list(Tokeniser(TOKENIZER, 50).all(iter(samples), inline=True))
    monkeypatch.setattr(tokens, "BATCH", 2_000)
    many = list(Tokeniser(TOKENIZER, 50).all(iter(samples)))
    assert len(many) > 50
    assert np.array_equal(np.concatenate([part.ids for part in many]), np.concatenate([part.ids for part in alone]))
    for name in ("truncated", "dropped", "skipped"):
        assert sum(getattr(part, name) for part in many) == sum(getattr(part, name) for part in alone)
    assert [n for part in many for n in part.lengths] == [n for part in alone for n in part.lengths]
    assert not multiprocessing.active_children()


def preparing(folder: Path) -> subprocess.Popen:
    byte_pairs(documents(100), 300).save_pretrained(folder / "tokenizer")
    command = [sys.executable, "scripts/prepare.py", *corpus(folder, documents(130_000))]
    command += [f"model.tokenizer={folder / 'tokenizer'}", "+task.one_in=20000", f"out={folder / 'out'}"]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(folder: Path, pattern: str) -> Path:
    deadline = time.monotonic() + 120
    while not (found := list(folder.glob(pattern))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found[0]


def children_of(process: subprocess.Popen) -> list[str]:
    return subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_stopped_is_not_taken_for_whole_and_starts_over(tmp_path, number):
    process = preparing(tmp_path)
    wait_for(tmp_path, "out/data/*.partial")
    while len(children := children_of(process)) < 2:  # the first of them is multiprocessing's own
        time.sleep(0.05)
    time.sleep(0.5)
    if number == signal.SIGINT:  # ctrl-C reaches the children too, which may import yet
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said = process.communicate()[1]
    assert "Traceback" not in said
    assert ("the same command starts over" in said) == (number != signal.SIGKILL)
    assert process.returncode == (130 if number != signal.SIGKILL else -signal.SIGKILL)
    assert not any(is_running(int(child)) for child in children)
    assert not list(tmp_path.glob("out/data/*/index.json"))
    again = preparing(tmp_path)
    assert "prepared 1" in again.communicate()[1] and again.returncode == 0
    assert not list(tmp_path.glob("out/data/*.partial"))


@pytest.mark.slow
def test_two_commands_at_once_prepare_once(tmp_path):
    both = [preparing(tmp_path) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("prepared 1" in text for text in said) == 1
    assert sum("another command prepares" in text for text in said) == 1
    assert len(list(tmp_path.glob("out/data/*/index.json"))) == 1


@pytest.mark.slow
def test_a_sample_longer_than_the_models_positions_is_an_error_before_all_training(command_here, tmp_path):
    arguments = ["train.py", "method=lora", *TINY, "model.architecture.max_position_embeddings=50"]
    done = command_here(*arguments, f"out={tmp_path}", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "samples of 74 tokens" in done.stderr and "training.max_length=50" in done.stderr
    assert not list(tmp_path.glob("work/*/checkpoints"))
    done = command_here(*arguments[:1], "method=prompt_tuning", "r=3", *arguments[2:], f"out={tmp_path}", check=False)
    assert "beside 3 virtual tokens" in done.stderr and "training.max_length=47" in done.stderr
