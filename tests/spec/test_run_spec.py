"""Composing and validating: recipes, identity, and errors that name what would work."""

from pathlib import Path

import pytest
import yaml
from tiny import ROOT

from mora_repro.errors import UserError
from mora_repro.results.records import Store
from mora_repro.run import _base_overrides
from mora_repro.spec import CONF, RunSpec, compose_config
from mora_repro.spec.compose import find_row, options, resolve_scale
from mora_repro.spec.run_spec import sha256_of
from mora_repro.spec.table import load_table

SHARED_RECIPES = CONF.parents[1] / "shared" / "paper" / "recipes.yaml"


def spec(*overrides: str) -> RunSpec:
    return RunSpec.from_config(compose_config(["scale=mini", *overrides]))


@pytest.mark.parametrize("scale", options("scale"))
@pytest.mark.parametrize("task", ["uuid", "gsm8k", "biomed", "finance"])
@pytest.mark.parametrize("method", options("method"))
def test_every_method_composes_with_every_task_at_every_scale(scale, task, method):
    needed = {"peft": ["method.peft._target_=peft.IA3Config"], "adalora": ["trainer=ddp"]}.get(method, [])
    run = spec(f"scale={scale}", f"task={task}", f"method={method}", *needed)
    assert (run.scale, run.task["name"], run.method.name) == (scale, task, method)
    assert (run.r is None) == (method in ("fft", "peft"))
    assert run.model.name == {"mini": "mini", "paper": "llama2_7b"}[scale]


@pytest.mark.parametrize("model", [m for m in options("model") if m != "hf"])
def test_every_model_composes(model):
    assert spec(f"model={model}").model.name == model


@pytest.mark.skipif(not SHARED_RECIPES.exists(), reason="the paper's recipes are not beside this checkout")
@pytest.mark.parametrize(
    ("task", "named"),
    [
        ("uuid", "uuid"),
        ("gsm8k", "gsm8k"),
        ("biomed", "continual_pretraining"),
        ("finance", "continual_pretraining"),
    ],
)
def test_paper_recipes_are_those_of_the_paper(task, named):
    paper = yaml.safe_load(SHARED_RECIPES.read_text())[named]
    for row in paper["rows"]:
        method = row["method"].removesuffix("_like")
        for r in row.get("r") if isinstance(row.get("r"), list) else [row.get("r")]:
            ours = find_row("paper", task, method, r)
            assert ours["search"]["lr"] == row["lr"] and ours["lr"] in row["lr"]
            for key in ("alpha", "operator"):
                if key in row:
                    assert ours[key] == row[key]
            run = spec("scale=paper", f"task={task}", f"method={method}", *([f"r={r}"] if r else []))
            assert run.training.batch_size == paper["batch_size"]
            assert run.training.epochs == paper["epochs"]
            if "warmup_steps" in paper:
                assert run.training.warmup_steps == paper["warmup_steps"]
                assert run.training.schedule == paper["schedule"]


def test_a_secret_that_comes_by_interpolation_is_refused_too(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "not-to-be-kept")
    with pytest.raises(UserError, match="environment variable MY_TOKEN") as caught:
        spec("+task.note=${oc.env:MY_TOKEN}")
    assert "not-to-be-kept" not in str(caught.value)


def test_the_recipe_follows_method_and_rank():
    low, high = spec("method=mora", "r=4"), spec("method=mora", "r=32")
    assert low.method.peft["operator"] == "rotation" and high.method.peft["operator"] == "sharing"
    assert low.lr != high.lr and low.method.peft["r"] == 4


@pytest.mark.parametrize(("r", "nearest"), [(1, 4), (4, 4), (7, 4), (256, 32), (5, 4)])
def test_a_rank_without_a_recipe_takes_the_nearest_and_says_so(r, nearest):
    run = spec("method=mora", f"r={r}")
    assert run.lr == spec("method=mora", f"r={nearest}").lr and run.r == r
    notices = run.notices()
    assert notices == [] if r == nearest else f"r={r}" in notices[0] and f"r={nearest}" in notices[0]


def test_any_recipe_value_can_be_overridden():
    run = spec("method=lora", "r=4", "lr=0.5", "training.batch_size=7", "method.peft.lora_alpha=3")
    assert (run.lr, run.training.batch_size, run.method.peft["lora_alpha"]) == (0.5, 7, 3)


def test_the_identity_covers_the_result_and_nothing_else():
    base = spec("method=lora", "r=4")
    assert spec("method=lora", "r=4", "out=/elsewhere", "rerun=true", "method.title=x", "task.title=y").id == base.id
    others = {
        spec("method=lora", "r=4", override).id
        for override in (
            "seed=1",
            "lr=0.1",
            "r=8",
            "task.pairs=3",
            "training.steps=500",
            "method.peft.lora_alpha=3",
        )
    }
    assert len(others) == 6 and base.id not in others
    assert base.id.startswith("mini-uuid-lora-r4-s0-")


@pytest.mark.parametrize("scale", options("scale"))
def test_merges_follow_the_recipe(scale):
    run = spec(f"scale={scale}", "task=gsm8k", "method=remora")
    assert (run.method.merge.every, run.method.merge.restart_warmup) == {"paper": (2000, 50), "mini": (100, 10)}[scale]
    assert run.method.merge.groupings == (("strided", "strided"), ("blocked", "blocked"))
    with pytest.raises(UserError, match=r"restart_warmup=\d+ must be less than method.merge.every=5"):
        spec(f"scale={scale}", "method=relora", "method.merge.every=5")


@pytest.mark.parametrize(("r", "times"), [(1, 2), (2, 3), (3, 5), (4, 6), (256, 384)])
def test_adalora_starts_with_half_more_ranks(r, times):
    assert spec("method=adalora", f"r={r}").method.peft["init_r"] == times


def test_the_committed_records_are_found_again():
    records, problems = Store(ROOT / "results").load_all()
    assert records and not problems
    assert [record.id for record in records] == [record.spec.id for record in records]
    known = {record.id for record in records}
    for cell in load_table("2").cells("mini"):
        assert {cell.spec(seed).id for seed in range(3)} <= known


def test_the_identity_covers_the_base_that_the_model_starts_from():
    run = spec("method=mora", "r=4")
    assert run.model.base_id == run.base_spec().id
    assert run.base_spec().model.base is None and run.base_spec().method.name == "fft"
    wider = spec("method=mora", "r=4", "model.architecture.hidden_size=64")
    assert wider.base_spec().model.architecture["hidden_size"] == 64
    assert wider.model.base_id != run.model.base_id


def test_the_identity_covers_the_content_of_local_folders(tmp_path):
    def made() -> RunSpec:
        sha256_of.cache_clear()
        return spec("task=gsm8k", "method=lora", f"task.data={tmp_path}")

    (tmp_path / "train.jsonl").write_text("a")
    first = made()
    assert made() == first and RunSpec.model_validate_json(first.model_dump_json()).id == first.id
    (tmp_path / "train.jsonl").write_text("b")
    second = made()
    (tmp_path / "train.jsonl").rename(tmp_path / "test.jsonl")
    assert len({first.id, second.id, made().id}) == 3
    assert spec("task=gsm8k", "method=lora").content == {}


def test_the_command_of_a_base_composes_the_base():
    overrides = ["method=mora", "task=gsm8k", "scale=mini", "r=4", "model.architecture.hidden_size=64", "lr=1"]
    run = RunSpec.from_config(compose_config(overrides))
    assert RunSpec.from_config(compose_config(_base_overrides(run, overrides))).id == run.model.base_id


def test_a_spec_survives_json():
    run = spec("method=mora", "r=4")
    assert RunSpec.model_validate_json(run.model_dump_json()) == run


def test_scale_auto_is_paper_in_a_slurm_job_and_mini_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    arguments, notice = resolve_scale(["method=lora"])
    assert arguments == ["scale=mini", "method=lora"] and "no CUDA device" in notice
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert resolve_scale(["scale=auto"])[0] == ["scale=paper"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert resolve_scale([])[0] == ["scale=paper"]
    assert resolve_scale(["scale=mini"]) == (["scale=mini"], None)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method=moar", ["method=moar is not known", "Did you mean mora", "fft, hira, lora, lora_plus, miss, mora"]),
        ("task=uid", ["task=uid is not known", "Did you mean uuid", "gsm8k"]),
        ("scale=min", ["scale=min is not known", "Did you mean mini", "auto"]),
        ("model=lama2_7b", ["Did you mean llama2_7b"]),
        ("sede=1", ["no key 'sede'", "Did you mean seed", "--cfg job"]),
        ("training.step=1", ["no key 'training.step'", "Did you mean training.steps"]),
        ("batch_size=1", ["no key 'batch_size'", "training.batch_size"]),
        ("r=0", ["r=0", "greater than 0"]),
        ("lr=fast", ["lr='fast'", "number"]),
        ("lr=-1", ["lr=-1", "greater than 0"]),
        ("training.schedule=cosin", ["training.schedule='cosin'", "'cosine'"]),
        ("training.epochs=3", ["one of training.steps and training.epochs"]),
        ("training.steps=50", ["training.steps=50 is less than training.warmup_steps=10", "decay_steps=90"]),
        ("training.steps=8", ["Lower those too: training.warmup_steps=0 training.decay_steps=4"]),
        ("+learning_rate=3", ["learning_rate=3: extra inputs are not permitted"]),
        ("training.micro_batch_size=5", ["training.batch_size=16", "micro_batch_size=5"]),
        ("model=hf", ["model.pretrained", "must be given"]),
        ("no equals sign", ["'no equals sign' is no override", "key=value"]),
    ],
)
def test_a_mistake_is_named_with_what_would_work(override, said):
    with pytest.raises(UserError) as caught:
        spec(override)
    for words in said:
        assert words in str(caught.value), str(caught.value)


def test_a_rank_for_a_method_without_one_is_refused():
    with pytest.raises(UserError, match=r"method=fft has no rank.*method=lora r=8"):
        spec("method=fft", "r=8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.py", "method=moar"], "Did you mean mora"),
        (["train.py", "scale=mini", "training.stepps=3"], "Did you mean training.steps"),
        (["train.py", "scale=mini", "r=0"], "r=0"),
        (["scripts/sweep.py", "table=9"], "table=9"),
        (["scripts/sweep.py", "tabel=2"], "Did you mean table"),
        (["scripts/sweep.py"], "which runs? table=<name>"),
        (["scripts/sweep.py", "table=2", "seed=3"], "All keys: python scripts/sweep.py --cfg job"),
        (["train.py", "r=abc"], "r='abc': a rank is a whole number"),
        (["train.py", "model=hf"], "add to the command: model.pretrained=..."),
        (["train.py", "scale=auto,mini", "-m"], "can't be swept"),
        (["train.py", "out=", "method=fft"], "out= is empty"),
        (["train.py", "training.evaluate_at=5"], "training.evaluate_at=5: input should be a list"),
        (["train.py", "--cfg", "job", "stepz=3"], "there is no key 'stepz'"),
        (["train.py", "-m", "scale=mini", "r=abc,8"], "scale=mini r=abc: r='abc'"),
        (["scripts/report.py", "out=/nowhere"], "sweep.py"),
    ],
)
def test_a_command_ends_with_one_error(command_here, arguments, said):
    done = command_here(*arguments, check=False)
    assert done.returncode == 2
    assert said in done.stderr and "error: " in done.stderr


@pytest.mark.parametrize("arguments", [["train.py", "scale=mini", "method=moar"], ["scripts/sweep.py", "table=9"]])
def test_an_error_has_no_traceback_and_hydra_adds_nothing_to_it(command, arguments):
    done = command(*arguments, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr and "HYDRA" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["method=mora", "r=8", "--cfg", "job", "--resolve"], ["--cfg", "job", "method=mora", "r=8", "--resolve"]],
)
def test_a_run_is_shown_whole_also_with_flags_before_overrides(command, arguments):
    shown = yaml.safe_load(command("train.py", *arguments).stdout)
    assert shown["r"] == 8 and shown["scale"]["name"] == "mini" and shown["training"]["evaluate_at"][-1] == 300


def test_help_lists_the_keys_and_their_choices(command):
    text = command("train.py", "--help").stdout
    for word in [
        "Jiang et al. 2024",
        "finance, finance_base, gsm8k, gsm8k_base, instruct",
        "llama2_7b",
        "seed",
        "python train.py method=mora task=gsm8k r=256",
    ]:
        assert word in text
    text = command("scripts/sweep.py", "--help").stdout
    assert "figure2" in text and "search" in text


def test_paper_scale_without_a_gpu_says_what_it_needs(command_here, tmp_path: Path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = command_here("train.py", "method=mora", "r=8", "scale=paper", f"out={tmp_path}", check=False)
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stderr and "GB" in done.stderr
    assert "python train.py method=mora task=uuid scale=mini" in done.stderr
    assert list(tmp_path.iterdir()) == []
