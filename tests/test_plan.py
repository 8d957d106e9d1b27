"""What runs would take: the numbers of a plan, what it says of runs that can't be, and the commands."""

import csv
import math
from pathlib import Path

import pytest
import torch
from tiny import ROOT

from mora_repro.errors import UserError
from mora_repro.gpus import Gpu, Machine, gpu_called, known_gpus
from mora_repro.plan import plan_run, reached, size_of, tries
from mora_repro.results.records import Record, Store
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.table import Cell

A100 = known_gpus()["a100-80gb"]
SMALL = Gpu(title="a small GPU", memory_gb=8, tflops=100, source="none")
PAPER = ["scale=paper", "method=lora", "r=8"]


def spec(*overrides: str) -> RunSpec:
    return RunSpec.from_config(compose_config(list(overrides)))


def machine(**values: object) -> Machine:
    given = {"gpu": "a100-80gb", "gpus": None, "nodes": "1x8", "utilisation": 0.4, "calibrate": None, "price": None}
    return Machine.model_validate({**given, "micro_batch": "recipe", **values})


def test_hours_are_arithmetic_over_what_the_gpus_reach():
    planned = plan_run(spec(*PAPER, "task=biomed"), A100, 8, utilisation=0.5)
    assert planned.trainer == "zero2"
    assert planned.micro["zero2"] * planned.accumulation * 8 == 128
    # 437 M tokens in blocks of 2,048, 128 a step, three times over.
    assert planned.steps == math.ceil(3 * math.ceil(437_000_000 // 2048 / 128)) == 5004
    assert planned.tokens == 5004 * 128 * 2048
    assert planned.hours == pytest.approx(planned.flops / (8 * 312e12 * 0.5) / 3600)
    assert planned.gpu_hours == 8 * planned.hours
    # Forwards, the gradients of inputs and what is recomputed: 6 of the frozen 6.6 B, 2 more than Kaplan's 4.
    base = 6 * 6.6e9 * planned.tokens
    assert base < planned.flops < 1.25 * base


def test_more_gpus_take_as_many_gpu_hours():
    eight, sixteen = (plan_run(spec(*PAPER, "task=gsm8k"), A100, number, 0.4) for number in (8, 16))
    assert sixteen.flops == pytest.approx(eight.flops, rel=1e-9)
    assert sixteen.hours == pytest.approx(eight.hours / 2)
    assert sixteen.micro["zero2"] * sixteen.accumulation * 16 == 128


def test_the_micro_batch_is_the_recipes_or_the_largest_that_fits():
    run = spec(*PAPER, "task=biomed")
    taken = plan_run(run, A100, 8, 0.4)
    largest = plan_run(run, A100, 8, 0.4, largest=True)
    assert taken.micro["zero2"] == 8 < largest.micro["zero2"] == 16  # all of a GPU's share of 128
    assert largest.memory["zero2"].total <= 80e9
    tight = plan_run(run, known_gpus()["l40s"].model_copy(update={"memory_gb": 24}), 8, 0.4)
    assert tight.micro["zero2"] < 8 and tight.fits["zero2"]


def test_a_higher_stage_is_taken_where_the_runs_own_does_not_fit():
    planned = plan_run(
        spec("scale=paper", "method=fft", "task=gsm8k"), A100.model_copy(update={"memory_gb": 60}), 2, 0.4
    )
    assert not planned.fits["zero2"] and planned.trainer == "zero3"


def test_a_model_that_fits_nowhere_says_what_would_help():
    run = spec(*PAPER, "task=biomed", "trainer.gradient_checkpointing=false")
    planned = plan_run(run, SMALL.model_copy(update={"memory_gb": 3}), 2, 0.4)
    assert planned.trainer is None and planned.hours == 0
    assert "fits on a small GPU under no trainer" in planned.problem
    assert "trainer.gradient_checkpointing=true" in planned.problem
    assert "shorter samples: training.max_length=1024" in planned.problem


def test_a_batch_that_the_gpus_cannot_share_is_a_problem_with_what_can():
    planned = plan_run(spec(*PAPER, "task=uuid"), A100, 32, 0.4)
    assert planned.trainer is None
    assert "training.batch_size=1000 can't be shared by 32 processes" in planned.problem
    assert "trainer.processes=25" in planned.problem


def test_a_rank_that_the_model_is_too_small_for_is_a_problem():
    planned = plan_run(spec("scale=paper", "method=mora", "r=256", "task=pretrain"), A100, 8, 0.4)
    assert planned.trainer is None and "The largest r that fits is 177" in planned.problem


def test_trainers_that_a_method_cannot_use_are_left_out():
    planned = plan_run(spec("scale=paper", "method=adalora", "task=gsm8k", "r=8", "trainer=ddp"), A100, 8, 0.4)
    assert set(planned.memory) == {"ddp"} and planned.trainer == "ddp"


def test_sizes_at_scale_mini_are_counted():
    size = size_of(spec("scale=mini", "task=uuid"))
    # Bytes: a key, a colon, a value, and the end token.
    assert (size.samples, size.mean, size.longest, size.note) == (64, 74, 74, None)
    packed = size_of(spec("scale=mini", "task=biomed"))
    assert packed.mean == packed.longest and packed.samples > 0


def test_sizes_of_a_corpus_are_documented_and_said_to_be():
    size = size_of(spec(*PAPER, "task=instruct"))
    assert size.samples == 326154 and size.mean < size.longest == 2048
    assert "326,154 samples of some 950 tokens" in size.note
    assert size_of(spec(*PAPER, "task=uuid")).samples == 10000


def test_a_users_own_file_is_counted(tmp_path):
    (tmp_path / "texts.txt").write_text("one two three\n\n" * 50)
    size = size_of(spec("scale=mini", "method=lora", "task=pretrain", f"task.data={tmp_path / 'texts.txt'}"))
    assert size.samples * size.longest < 3 * 15 * 50


def test_a_search_makes_the_tries_of_its_grid_and_the_rounds_around_it():
    assert tries(Cell("lora", 8, "uuid", "paper")) == 3 + 1
    assert tries(Cell("fft", None, "uuid", "paper")) == 3 + 1  # as many as every other row


def record(tmp_path: Path, gpus: list[str], tokens_per_s: float) -> Path:
    """A real run's record, as if it had run elsewhere."""
    source = next((ROOT / "results" / "runs").glob("mini-uuid-lora-r4-s0-*.json"))
    found = Record.model_validate_json(source.read_text())
    environment = found.environment.model_copy(update={"gpus": gpus, "processes": 2})
    trainer = found.spec.trainer.model_copy(update={"name": "ddp", "processes": 2})
    cost = found.cost.model_copy(update={"tokens_per_s": tokens_per_s})
    run = found.spec.model_copy(update={"trainer": trainer})
    path = tmp_path / "record.json"
    path.write_text(found.model_copy(update={"environment": environment, "cost": cost, "spec": run}).model_dump_json())
    return path


def test_utilisation_is_that_of_a_record(tmp_path):
    device = "NVIDIA H100 80GB HBM3"
    slow, fast = (
        reached(str(record(tmp_path, [device] * 2, speed)), machine(), Store(tmp_path)) for speed in (1e6, 2e6)
    )
    assert fast == pytest.approx(2 * slow)
    # 4 P and a little for a token of a frozen base of 0.66 M weights beside embeddings, over two GPUs of 989 TFLOP/s.
    assert slow == pytest.approx(1e6 * 4 * 0.66e6 / (2 * 989e12), rel=0.3)


@pytest.mark.parametrize(
    ("gpus", "said"), [([], "ran on a CPU"), (["Voodoo 2"], "ran on Voodoo 2, which is not in conf/gpus.yaml")]
)
def test_a_record_without_a_known_gpu_cannot_calibrate(tmp_path, gpus, said):
    with pytest.raises(UserError, match=said):
        reached(str(record(tmp_path, gpus, 1e6)), machine(), Store(tmp_path))
    with pytest.raises(UserError, match="can't be read"):
        reached("no-such-run", machine(), Store(tmp_path))


def test_a_gpu_of_ones_own_and_those_that_are_not_known(tmp_path):
    own = tmp_path / "gpus.yaml"
    own.write_text("mine: {title: Mine, memory_gb: 12, tflops: 50, source: my own, names: [Mine 3000]}\n")
    assert machine(gpu="mine", gpus=str(own)).model().memory_gb == 12
    assert gpu_called("NVIDIA Mine 3000", machine(gpus=str(own)).known()) == "mine"
    with pytest.raises(UserError, match=r"gpu=a100-80g is not known\. Did you mean a100-80gb"):
        machine(gpu="a100-80g").model()
    own.write_text("mine: {title: Mine}\n")
    with pytest.raises(UserError, match="has no GPUs"):
        machine(gpu="mine", gpus=str(own)).model()
    with pytest.raises(UserError, match="can't be read"):
        machine(gpu="mine", gpus=str(tmp_path / "none.yaml")).model()


def test_devices_are_found_by_what_torch_calls_them():
    called = {
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "NVIDIA A100 80GB PCIe": "a100-80gb",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA H100 80GB HBM3": "h100-80gb",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200": "h200",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA GeForce GTX 1080": None,
    }
    assert {device: gpu_called(device, known_gpus()) for device in called} == called


@pytest.mark.parametrize(("nodes", "shape"), [("2x8", (2, 8)), (8, (1, 8)), ("4", (1, 4)), (None, None)])
def test_nodes_are_nodes_times_gpus(nodes, shape):
    assert machine(nodes=nodes).shape() == shape


@pytest.mark.parametrize("nodes", ["2x", "x8", "0x8", "2x8x2", "two", -1])
def test_nodes_of_another_form_are_an_error(nodes):
    with pytest.raises(UserError, match="such as nodes=2x8"):
        machine(nodes=nodes).shape()


def test_a_table_in_total_and_every_number_in_a_file(command_here, tmp_path):
    out = tmp_path / "plan.csv"
    done = command_here("scripts/plan.py", "table=2", "nodes=1x8", "price=2", "seeds=3", "search=true", f"csv={out}")
    assert "Time of a run" in done.stdout and "10,000 samples of some 60 tokens" in done.stdout
    rows = list(csv.DictReader(out.open()))
    assert {row["method"] for row in rows} == {"FFT", "LoRA r=8", "MoRA r=8", "LoRA r=256", "MoRA r=256"}
    taken = [row for row in rows if row["taken"] == "True"]
    assert len(taken) == 5 and all(int(row["runs"]) == 3 + 4 for row in taken)
    money = sum(float(row["money"]) for row in taken)
    assert money == pytest.approx(sum(2 * 7 * float(row["gpu_hours"]) for row in taken))
    assert f"{money:,.0f}" in done.stdout


def test_a_cell_that_cannot_be_is_said_and_the_others_planned(command_here, tmp_path):
    cells = tmp_path / "cells.yaml"
    cells.write_text(
        "name: mine\ntitle: mine\nmethod: lora\nrank: low\nrows: [{task: uuid}, {task: gsm8k}]\ncolumns: []\n"
    )
    done = command_here("scripts/plan.py", f"cells={cells}", "nodes=4x8", f"csv={tmp_path / 'plan.csv'}", check=False)
    assert done.returncode == 1
    assert "can't be: uuid LoRA r=8: training.batch_size=1000 can't be shared by 32 processes" in done.stdout
    assert "gsm8k" in done.stdout and "GPU-hours" in done.stdout


def test_plan_of_one_run_at_scale_paper_needs_no_gpu_and_writes_nothing(command_here, tmp_path):
    done = command_here("train.py", *PAPER, "task=gsm8k", "plan=true", f"out={tmp_path / 'out'}")
    assert "19,988,480 of 6,758,404,096 parameters are trained" in done.stdout
    assert "zero2 (taken)" in done.stdout and "zero3_offload" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_wrong_value_of_the_machine_is_named(command_here):
    done = command_here("train.py", *PAPER, "task=gsm8k", "plan=true", "machine.utilisation=2", check=False)
    assert done.returncode == 2 and "machine.utilisation=2" in done.stderr
    done = command_here("scripts/plan.py", "table=2", "nodes=2by8", check=False)
    assert done.returncode == 2 and "such as nodes=2x8" in done.stderr


def test_the_benchmark_runs_where_there_is_no_gpu(command, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("of machines without a GPU")
    assert "finds no CUDA device" in command("benchmarks/gpu_memory.py").stdout
    out = tmp_path / "gpu.json"
    done = command("benchmarks/gpu_memory.py", "--tiny", "--methods=mora", f"--out={out}")
    assert "planned" in done.stdout and out.exists()


def test_what_is_planned_is_no_part_of_a_runs_identity():
    plain = spec(*PAPER, "task=gsm8k")
    assert spec(*PAPER, "task=gsm8k", "plan=true", "machine.gpu=h200", "machine.price=3").id == plain.id
