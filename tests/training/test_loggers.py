"""Loggers in real trainings: what they keep is what the Trainer logged, and their failures never reach the run."""

import json
import os
import pty
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import ROOT, TINY
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from mora_repro.errors import UserError
from mora_repro.spec import RunSpec, compose_config
from mora_repro.training.loggers import Logger, logger_callback

logging.disable_progress_bar()

SPEC = RunSpec.from_config(compose_config(["method=lora", *TINY]))
WANDB = {"name": "wandb", "project": "mora", "entity": None, "mode": "offline"}
TENSORBOARD = {"name": "tensorboard"}


class Fails(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise FloatingPointError("the loss is nan")


class Stops(Fails):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_training_stop = True


def train(work: Path, logger: dict | Logger, *others: TrainerCallback, resume: bool = False) -> list[dict]:
    """A training whose checkpoints are at steps 2, 4 and 6; returns the Trainer's log."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    samples = [{"input_ids": torch.arange(i, i + 5), "labels": torch.arange(i, i + 5)} for i in range(10)]
    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    with logger if isinstance(logger, Logger) else logger_callback(logger, SPEC, work) as callback:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=samples,
            eval_dataset=samples[:2],
            callbacks=[callback, *others],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
    return trainer.state.log_history


def points(logs: list[dict]) -> dict[str, dict[int, float]]:
    """By name and step, as float32, which TensorBoard keeps."""
    found: dict[str, dict[int, float]] = {}
    for line in logs:
        for name, value in line.items():
            if name not in ("step", "epoch"):
                found.setdefault(name, {})[line["step"]] = torch.tensor(float(value)).item()
    return found


def events(work: Path) -> dict[str, dict[int, float]]:
    accumulator = EventAccumulator(str(work / "tensorboard")).Reload()
    found = {}
    for name in accumulator.Tags()["scalars"]:
        scalars = accumulator.Scalars(name)
        found[name] = {scalar.step: scalar.value for scalar in scalars}
        assert len(found[name]) == len(scalars), f"{name} has two values at a step"
    return found


def wandb_records(work: Path) -> list:
    """What an offline run of wandb kept, whole: its own process may still be at it."""
    [path] = work.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while not any(kind(record) == "exit" for record in records(path)):
        assert time.monotonic() < deadline, "wandb did not finish"
        time.sleep(0.05)
    return records(path)


def kind(record) -> str:
    return record.WhichOneof("record_type")


def records(path: Path) -> list:
    """Of wandb's file: a header of 7 bytes, then LevelDB's log format, of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found, part = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header starts so near to the end of a block
            at += 32768 - at % 32768
            continue
        _, length, place = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if place in (1, 4) and at <= len(data):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def history(kept: list) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for record in kept:
        if kind(record) == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    found.setdefault(name, {})[items["_step"]] = torch.tensor(float(value)).item()
    return found


def test_tensorboard_has_the_logs(tmp_path, capfd):
    logs = train(tmp_path, TENSORBOARD)
    assert events(tmp_path) == points(logs)
    assert {"loss", "learning_rate", "grad_norm", "eval_loss"} <= events(tmp_path).keys()
    assert "warning" not in capfd.readouterr().err


def test_a_resumed_run_writes_no_point_twice(tmp_path):
    # Fails at step 5, of which the checkpoint at step 4 knows nothing; and once before the first checkpoint.
    for step in (1, 5):
        with pytest.raises(FloatingPointError):
            train(tmp_path, TENSORBOARD, Fails(step))
    logs = train(tmp_path, TENSORBOARD, resume=True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    assert events(tmp_path) == points(logs)


def test_wandb_offline_has_the_logs_and_the_spec_and_no_secret(tmp_path, monkeypatch, capfd):
    secret = "0123456789" * 4
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("HF_TOKEN", secret)
    logs = train(tmp_path, WANDB)
    kept = wandb_records(tmp_path)
    run = next(record.run for record in kept if kind(record) == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {name: config[name] for name in SPEC.model_dump(mode="json")} == SPEC.model_dump(mode="json")
    assert run.run_id == SPEC.id and run.project == "mora"
    assert history(kept) == points(logs)
    assert [record.exit.exit_code for record in kept if kind(record) == "exit"] == [0]
    # Neither code nor output nor secrets are kept.
    assert not any(kind(record) in ("output", "output_raw") for record in kept)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert not any(secret.encode() in path.read_bytes() for path in files)
    assert not any(path.suffix in (".py", ".patch") for path in files)
    said = capfd.readouterr()
    assert "wandb" not in said.out + said.err and "warning" not in said.err


@pytest.mark.parametrize(("how", "status"), [(Stops(3), 130), (Fails(3), 1)])
def test_wandb_is_closed_when_a_run_is_interrupted_or_fails(tmp_path, how, status):
    try:
        train(tmp_path, WANDB, how)
    except FloatingPointError:
        assert type(how) is Fails
    assert [record.exit.exit_code for record in wandb_records(tmp_path) if kind(record) == "exit"] == [status]


def warnings(text: str) -> list[str]:
    assert text.count("the run goes on without it") == 1
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("logger", [WANDB, TENSORBOARD], ids=lambda logger: logger["name"])
def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, capfd, logger):
    (tmp_path / logger["name"]).touch()  # a file where its folder should be
    logs = train(tmp_path, logger)
    assert [line["step"] for line in logs if "loss" in line] == [1, 2, 3, 4, 5, 6]
    [line] = warnings(capfd.readouterr().err)
    assert line.startswith(f"warning: logger={logger['name']} can't start: ")


class Breaks:
    """A logger whose disk is full from step 3 on."""

    def __init__(self):
        self.calls: list[str] = []

    def log(self, values, step):
        self.calls.append(f"log {step}")
        if step == 3:
            raise OSError("no space")

    def flush(self):
        self.calls.append("flush")

    def close(self, status):
        self.calls.append("close")


def test_a_logger_that_fails_in_the_middle_is_one_warning_and_off(tmp_path, capfd):
    breaks = Breaks()
    logs = train(tmp_path, Logger("breaks", lambda step: breaks))
    assert [line["step"] for line in logs if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert breaks.calls == ["log 1", "log 2", "flush", "log 3"]
    assert warnings(capfd.readouterr().err) == [
        "warning: logger=breaks can't write: no space; the run goes on without it"
    ]


ONLINE = """
import sys
import time
from pathlib import Path
sys.path[:0] = ["tests", "tests/training"]
import test_loggers
logs = test_loggers.train(Path(sys.argv[1]), {**test_loggers.WANDB, "mode": "online"})
print("steps:", logs[-1]["step"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "0" * 40], ids=["no key", "no server"])
def test_wandb_online_without_a_key_or_a_server_asks_nothing_and_is_one_warning(tmp_path, key):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    if key:
        environment["WANDB_API_KEY"] = key
    ours, theirs = pty.openpty()  # a terminal, on which wandb would ask
    command = [sys.executable, "-c", ONLINE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdin=theirs, capture_output=True, text=True)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0 and "steps: 6" in done.stdout, done.stderr
    [line] = warnings(done.stderr)
    assert line.startswith("warning: logger=wandb can't start: ")
    assert ("WANDB_API_KEY" in line) == (key is None)
    assert "0" * 40 not in done.stderr + done.stdout


def test_other_processes_than_the_first_log_nothing(tmp_path):
    arguments, control = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True), TrainerControl()
    state = TrainerState(is_world_process_zero=False)
    with logger_callback(TENSORBOARD, SPEC, tmp_path) as callback:
        callback.on_train_begin(arguments, state, control)
        callback.on_log(arguments, state, control, logs={"loss": 1.0})
        callback.on_save(arguments, state, control)
    assert not (tmp_path / "tensorboard").exists()


def test_no_logger_is_no_callback(tmp_path):
    assert logger_callback({"name": "none"}, SPEC, tmp_path) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mode": "onlin"}, "logger.mode='onlin'"),
        ({"project": ""}, "logger.project=''"),
        ({"api_kee": 1}, "logger.api_kee=1"),
        ({"name": "mlflow"}, "'none', 'wandb', 'tensorboard'"),
    ],
)
def test_wrong_settings_are_a_user_error(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        logger_callback({**WANDB, **change}, SPEC, tmp_path)


@pytest.mark.parametrize(
    ("variable", "override", "mode"),
    [(None, [], "online"), ("offline", [], "offline"), ("offline", ["logger.mode=online"], "online")],
)
def test_the_configurations_are_accepted_and_wandbs_variable_is_heeded(tmp_path, monkeypatch, variable, override, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    logger = compose_config(["logger=wandb", *override]).logger
    assert logger.mode == mode
    assert logger_callback(dict(logger), SPEC, tmp_path) is not None
    assert logger_callback(dict(compose_config(["logger=tensorboard"]).logger), SPEC, tmp_path) is not None
    assert not list(tmp_path.iterdir())


def test_neither_library_is_imported_before_it_is_used():
    code = (
        "import sys, mora_repro.training.loggers; "
        "print(sorted({'wandb', 'tensorboard'} & {name.split('.')[0] for name in sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
