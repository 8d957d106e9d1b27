"""Text for pretraining: generated, or a corpus with a part held out; what is trained beside an adapter, and merges."""

import json
from itertools import chain

import pytest
import torch
from run_outcome import assert_same_run, only_record, weights
from tiny import ROOT, TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from mora_repro.data.grammar import documents, language
from mora_repro.data.pretrain import Pretrain
from mora_repro.data.task import build_task, document
from mora_repro.errors import UserError
from mora_repro.evaluation import evaluate
from mora_repro.methods import apply_method, load_base, load_tokenizer
from mora_repro.results.records import LOWER_IS_BETTER
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.compose import with_model
from mora_repro.spec.run_spec import Eval
from mora_repro.training.optimizer import parameter_groups

REAL = ROOT.parent / "shared" / "data" / "wikitext-2"
SMALL = [
    *(override for override in TINY if not override.startswith(("task=", "task.", "model.base"))),
    "task=pretrain",
    "task.documents=30",
    "task.test_limit=10",
    "training.max_length=32",
]
FUNCTION_WORDS = {"the", "a", "some", "that", "with", ".", "because", "while", "before", "so", "but"}


def spec(*overrides: str) -> RunSpec:
    return RunSpec.from_config(compose_config([*SMALL, *overrides]))


def task(*overrides: str) -> Pretrain:
    made = build_task(spec("method=fft", *overrides))
    assert isinstance(made, Pretrain)
    return made


def trained(made: Pretrain) -> list[str]:
    return [sample[0].text for sample in made.samples()]


def held_out(made: Pretrain, split: str = "test", **settings) -> list[str]:
    [perplexity] = made.benchmarks(Eval(split=split, **settings))
    assert perplexity.name == "perplexity" == made.metric and made.metric in LOWER_IS_BETTER
    return list(perplexity.texts)


def test_generated_text_is_a_function_of_seed_and_split():
    assert list(documents(0, "train", 20)) == list(documents(0, "train", 20))
    kinds = [(0, "train"), (1, "train"), (0, "test"), (0, "validation"), (100, "test")]
    texts = [set(documents(seed, split, 300)) for seed, split in kinds]
    assert len(set(chain(*texts))) == 300 * len(kinds)


def test_generated_text_keeps_to_the_language():
    known = language()
    nouns = {noun for topic in known.topics for noun in topic} | {noun for noun, _ in known.objects}
    words = FUNCTION_WORDS | set(known.names)
    for forms, ending in ((nouns, "s"), (set(chain(*known.verbs.values())), "t")):
        words |= forms | {f"{form}{ending}" for form in forms}
    words |= set(chain(*known.adjectives.values(), *known.adverbs.values()))
    text = " ".join(documents(0, "train", 300))
    assert set(text.split()) <= words


def test_verbs_agree_with_their_subjects():
    known = language()
    for text in documents(0, "train", 200):
        for sentence in text.split(" . "):
            phrase = sentence.split()
            place = 1 + (phrase[1] in chain(*known.adjectives.values()))
            noun, verb = phrase[place], phrase[place + 1 + (phrase[place + 1] == "that")]
            plural = noun not in known.verbs
            assert noun.removesuffix("s") in known.verbs if plural else True
            assert verb.removesuffix("t") in known.verbs[noun.removesuffix("s") if plural else noun]
            assert verb.endswith("t") != plural


def test_a_sample_is_a_document_whose_every_token_is_trained():
    made = task()
    assert list(made.samples()) == [document(text) for text in documents(0, "train", 30)] and made.packed
    assert len(held_out(made)) == 10 and len(held_out(made, limit=3)) == 3
    assert not set(held_out(made)) & set(held_out(made, "validation"))


def numbered(start: int, end: int) -> str:
    return "\n\n".join(f"Document {number}\nhas two lines." for number in range(start, end)) + "\n"


def test_of_one_text_file_a_part_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_text(numbered(0, 2000))
    made = task(f"task.data={tmp_path / 'book.txt'}", "task.test_limit=1000")
    parts = [trained(made), held_out(made), held_out(made, "validation")]
    assert sorted(chain(*parts)) == sorted(numbered(0, 2000).strip().split("\n\n"))
    assert len(parts[0]) > 1900 and len(parts[1]) > 5 and len(parts[2]) > 5


def test_a_folder_without_a_training_set_is_one_corpus_of_all_its_files(tmp_path):
    (tmp_path / "one.txt").write_text(numbered(0, 1000))
    (tmp_path / "test.txt").write_text(numbered(1000, 2000))
    made = task(f"task.data={tmp_path}", "task.test_limit=1000")
    texts = trained(made)
    assert {"Document 1\nhas two lines.", "Document 1999\nhas two lines."} & set(texts)
    assert not set(texts) & {*held_out(made), *held_out(made, "validation")}
    assert len(texts) + len(held_out(made)) + len(held_out(made, "validation")) == 2000


def test_a_folders_own_sets_are_taken_as_they_are(tmp_path):
    for split, start in (("train", 0), ("validation", 500), ("test", 600)):
        (tmp_path / f"{split}.txt").write_text(numbered(start, start + 50))
    made = task(f"task.data={tmp_path}", "task.test_limit=1000")
    assert [len(texts) for texts in (trained(made), held_out(made), held_out(made, "validation"))] == [50, 50, 50]
    assert held_out(made)[0].startswith("Document 600")


def test_perplexity_can_be_measured_on_another_file(tmp_path):
    (tmp_path / "other.txt").write_text(numbered(0, 3))
    assert held_out(task(), data={"perplexity": str(tmp_path / "other.txt")}) == numbered(0, 3).strip().split("\n\n")
    (tmp_path / "folder").mkdir()
    for split in ("test", "validation"):
        (tmp_path / "folder" / f"{split}.txt").write_text(split)
        assert held_out(task(), split, data={"perplexity": str(tmp_path / "folder")}) == [split]
    with pytest.raises(UserError, match=r"eval.data.perplexity=nowhere is not there. It should be a file of documents"):
        held_out(task(), data={"perplexity": "nowhere"})


def test_a_corpus_too_small_to_hold_documents_out_is_an_error_before_training(tmp_path):
    (tmp_path / "book.txt").write_text(numbered(0, 3))
    with pytest.raises(UserError, match=r"book.txt has too few documents: one in a hundred is held out for test"):
        held_out(task(f"task.data={tmp_path / 'book.txt'}"))


def test_bad_rows_are_named_or_skipped(tmp_path):
    lines = [json.dumps({"text": f"{number}"}) for number in range(20)] + ['{"text": 3}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = f"task.data={tmp_path / 'a.jsonl'}"
    with pytest.raises(UserError, match=r"a.jsonl, line 21.*'text' should be text.*task.on_bad_row=skip"):
        list(task(data).samples())
    assert list(task(data, "task.on_bad_row=skip").samples()).count(()) == 1


def test_no_file_at_all_is_named(tmp_path):
    with pytest.raises(UserError, match="holds nothing"):
        list(task(f"task.data={tmp_path}").samples())


def test_the_model_and_the_rank_are_the_tasks_own_at_scale_paper():
    run = RunSpec.from_config(compose_config(["task=pretrain", "scale=paper", "method=mora"]))
    assert (run.model.name, run.r, run.training.max_length) == ("llama_250m", 128, 512)
    assert with_model(["task=pretrain", "scale=paper", "model=llama_1_3b"])[0] == "task=pretrain"
    assert compose_config(["task=uuid", "scale=paper"]).model.name == "llama2_7b"
    assert compose_config(["task=pretrain", "scale=mini"]).model.name == "mini"


@pytest.mark.parametrize("method", ["mora", "relora", "adapter", "hira"])
def test_beside_an_adapter_embeddings_norms_and_head_are_trained_at_their_own_rate(method):
    run = spec(f"method={method}", "r=2", "training.also_trained_lr_factor=3")
    model = apply_method(load_base(run, load_tokenizer(run), None), run)
    beside = {name.split(".modules_to_save.")[0] for name, p in model.named_parameters() if "modules_to_save" in name}
    assert {name.rpartition(".")[2] for name in beside} == {*run.training.also_trained}
    rates = {}
    for group in parameter_groups(model, run.method, 1e-3, run.training, []):
        assert group["adapter"] == (group["lr"] == 1e-3)
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(3e-3 if ".modules_to_save." in name else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["relora", "remora"])
def test_a_run_with_merges_is_saved_whole_and_is_the_same_again(command_here, tmp_path, method):
    merges = [f"method={method}", "r=2", "method.merge.every=5", "method.merge.restart_warmup=1", "lr=1e-2"]
    plain = [override for override in SMALL if not override.startswith(("training.schedule", "training.decay"))]
    for out in ("one", "two"):
        command_here("train.py", *plain, *merges, f"out={tmp_path / out}")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    record = only_record(tmp_path / "one")
    assert record.evaluations[-1].stderr["perplexity"] > 0
    [saved] = (tmp_path / "one" / "work").glob("*/model")
    run = spec(*merges)
    initial = load_base(run, load_tokenizer(run), None).state_dict()
    assert weights(tmp_path / "one").keys() == initial.keys(), "a whole model, without the adapter's names"
    # The saved model is the one that was measured.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    again = evaluate(model, tokenizer, task().benchmarks(Eval()), 32).metrics["perplexity"]
    assert again == pytest.approx(record.metrics["perplexity"], rel=1e-4)
    assert record.metrics["perplexity"] < 0.9 * len(tokenizer)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real WikiText files are not beside this checkout")
def test_a_run_on_real_wikitext_reaches_its_record(command_here, tmp_path):
    steps = ["training.steps=4", "training.warmup_steps=1", "training.evaluate_at=[]"]
    command_here("train.py", "method=lora", "r=2", *SMALL, f"task.data={REAL}", *steps, f"out={tmp_path}")
    assert torch.isfinite(torch.tensor(only_record(tmp_path).metrics["perplexity"]))
