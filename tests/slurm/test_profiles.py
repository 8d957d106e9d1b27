"""Profiles, manifests and scripts, where no cluster is needed."""

import json
import os
import shlex
import subprocess

import pytest
import yaml
from sweeps import OVERRIDES, Submitted

from mora_repro import worker
from mora_repro.errors import UserError
from mora_repro.slurm.profile import LAUNCHER, Profile, shape_of
from mora_repro.slurm.scripts import check
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.options import Options, RunFile

FFT = [{"method": "fft"}]


def test_the_examples_are_valid():
    for path in (LAUNCHER / "profile").glob("*.yaml"):
        Profile.load(path.stem)


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"partitoin": "gpu"}, r"unknown key 'partitoin'\. Did you mean partition"),
        ({"minutes": "soon"}, "minutes='soon'"),
        ({"minutes": 2}, "too short for a checkpoint.*signal_seconds=120.*minutes: 5 or more"),
        ({"tasks": {"uuid": {"minutes": 1}}}, r"tasks\.uuid\.minutes=1 is too short"),
        ({"tasks": {"uuid": {"hours": 1}}}, "hours"),
        ({"account": "me\nrm -rf /"}, "a line break"),
        ({"env": {"A=B; C": "1"}}, "is no name of a variable"),
        ({"env": {"HF_TOKEN": "hf_1234567890"}}, "looks like a secret"),
        ({"setup": ["export WANDB_API_KEY=1234567890"]}, "looks like a secret"),
        ({"gpus_per_node": 2, "packed": 4}, "more than gpus_per_node=2"),
    ],
)
def test_a_profile_that_cannot_be_is_one_error(tmp_path, profile, said):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(profile))
    with pytest.raises(UserError, match=said) as error:
        Profile.load(str(path))
    assert "1234567890" not in str(error.value)


def test_a_profile_that_is_not_there_says_which_are():
    with pytest.raises(UserError, match=r"profile=a10 is none of a100, cpu.*Did you mean a100.*cp .*mycluster.yaml"):
        Profile.load("a10")


@pytest.mark.parametrize(
    ("trainer", "shape"),
    [
        (["trainer=plain"], (1, 1, 4)),
        (["trainer=zero2"], (2, 4, 1)),
        (["trainer=zero2", "trainer.processes=2"], (1, 2, 1)),
        (["trainer=zero2", "trainer.processes=16"], (4, 4, 1)),
        (["trainer=zero2", "trainer.processes=1"], (1, 1, 1)),
    ],
)
def test_what_a_run_takes_follows_from_its_trainer_and_the_profile(trainer, shape):
    profile = Profile.load(None).model_copy(update={"nodes": 2, "gpus_per_node": 4, "packed": 4})
    spec = RunSpec.from_config(compose_config(["scale=mini", "method=lora", "training.batch_size=16", *trainer]))
    found = shape_of(spec, profile)
    assert (found.nodes, found.processes, found.packed) == shape


def test_runs_side_by_side_have_a_file_and_a_gpu_each(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert worker._own(["a.json", "b.json"]) == "b.json"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    assert worker._own(["a.json"]) == "a.json"


def test_processes_that_do_not_fill_their_nodes_are_refused():
    profile = Profile.load(None).model_copy(update={"gpus_per_node": 4})
    spec = RunSpec.from_config(compose_config(["scale=mini", "method=lora", "trainer=ddp", "trainer.processes=6"]))
    with pytest.raises(UserError, match=r"processes=6 does not fill nodes of 4.*processes=4"):
        shape_of(spec, profile)


def test_a_dry_run_prints_scripts_that_bash_can_read_and_writes_nothing(tmp_path, capsys):
    row = {"method": "lora", "rank": "low", "overrides": ["trainer=zero2", "trainer.processes=null"]}
    sweep = Submitted(tmp_path, [*FFT, row], {"nodes": 2, "gpus_per_node": 2, "scratch": "/local", "interface": "ib0"})
    assert sweep(dry_run=True) == 0
    said = capsys.readouterr().out
    assert "2 runs in 2 arrays of 2 elements; at most 0.5 node-hours and 0.8 GPU-hours" in said, said[-500:]
    for script in said.split("#!/bin/bash")[1:]:
        subprocess.run(["bash", "-n"], input=script.partition("\n# train-")[0], text=True, check=True)
    assert not sweep.out.exists()


@pytest.mark.slow
def test_data_that_is_not_prepared_is_named_with_the_commands_for_all_runs(tmp_path, command):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        row = json.dumps({"question": f"how many in {split}?", "answer": "one and one #### 2"})
        (tmp_path / "data" / f"{split}.jsonl").write_text(row + "\n")
    model = [text for text in OVERRIDES if text.startswith("model.")]
    files = []
    for seed in (0, 1):
        overrides = ["method=fft", "task=gsm8k", "scale=mini", f"task.data={tmp_path / 'data'}", *model, f"seed={seed}"]
        spec = RunSpec.from_config(compose_config(overrides))
        files.append(tmp_path / f"{seed}.json")
        options = Options(out=str(tmp_path / "out"), overrides=tuple(overrides))
        files[-1].write_text(RunFile(spec=spec, options=options).model_dump_json())
    with pytest.raises(UserError, match=r"2 of 2 runs lack .* training set is not in \S+/out/data") as error:
        check(files)
    commands = str(error.value).splitlines()[2:]
    assert len(commands) == 2
    for line in commands:
        command(*shlex.split(line)[1:])
    assert check(files) == 0


def test_without_slurm_it_says_what_installs_it_and_what_works(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is none.*apt-get install slurm-client.*dry_run=true"):
        Submitted(tmp_path, FFT)()


def test_a_manifest_of_another_version_is_not_touched(tmp_path):
    sweep = Submitted(tmp_path, FFT)
    sweep.path.mkdir(parents=True)
    (sweep.path / "manifest.json").write_text(text := json.dumps({"version": 99, "made_with": {"mora-repro": "9.9"}}))
    with pytest.raises(UserError, match=r"another version.*format is 99.*'9\.9'.*name=own-mini-2"):
        sweep(status=True)
    assert (sweep.path / "manifest.json").read_text() == text


def test_a_sweep_that_was_never_submitted_says_which_are(tmp_path):
    with pytest.raises(UserError, match="no sweep own-mini has been submitted"):
        Submitted(tmp_path, FFT)(status=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["launcher=slurm", "status=true", "retry=true"], "one at a time"),
        (["dry_run=true"], "add launcher=slurm"),
        (["launcher=moon"], "launcher='moon'"),
        (["launcher=slurm", "name=../x"], "a sweep is named by letters"),
    ],
)
def test_keys_that_do_not_go_together_are_one_error(command_here, tmp_path, arguments, said):
    done = command_here("scripts/sweep.py", "table=2", f"out={tmp_path}", *arguments, check=False)
    assert done.returncode == 2 and said in done.stderr
