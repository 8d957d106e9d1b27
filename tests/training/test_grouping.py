"""Examples of about the same length in a step: the same order in every process and after a resume."""

import random
import signal

import pytest
from held import HELD_GSM8K, stopped
from run_outcome import assert_same_run, only_record
from tiny import TINY

from mora_repro.spec import RunSpec, compose_config
from mora_repro.training.train import GroupedByLength

# Samples of several lengths, three epochs of them.
GROUPED = [
    *(override for override in TINY if not override.startswith("task")),
    "task=gsm8k",
    HELD_GSM8K,
    "task.train_limit=44",
    "task.test_limit=2",
    "training.group_by_length=true",
    "training.steps=30",
    "training.evaluate_at=[16]",  # in the second epoch
]


def order(lengths: list[int], seed: int, steps_done: int) -> list[int]:
    return list(GroupedByLength(10, lengths, seed, lambda: steps_done))


def test_every_example_comes_once_an_epoch_beside_others_of_its_length():
    dice = random.Random(0)
    lengths = [dice.randint(1, 500) for _ in range(1000)]
    orders = []
    for steps_done in (0, 100):
        orders.append(order(lengths, 3, steps_done))
        assert sorted(orders[-1]) == list(range(1000))
        steps = [[lengths[index] for index in orders[-1][start : start + 10]] for start in range(10, 1000, 10)]
        padding = sum(max(step) * len(step) - sum(step) for step in steps)
        assert padding < 0.1 * sum(lengths)  # in a random order it is nine tenths
    assert orders[0] != orders[1]
    assert order(lengths, 3, 199) == orders[1] != order(lengths, 4, 199)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_bit_and_two_processes_have_the_same_batches(command, tmp_path):
    for trainer in ("plain", "ddp"):
        whole, cut = tmp_path / trainer, tmp_path / f"{trainer}-cut"
        how = [f"trainer={trainer}", f"trainer.processes={1 if trainer == 'plain' else 2}"]
        arguments = ["train.py", "method=lora", *GROUPED, *how]
        command(*arguments, f"out={whole}")
        status, said = stopped(tmp_path / "hold", signal.SIGTERM, *arguments, f"out={cut}")
        assert status == 130 and only_record(cut).status == "interrupted", said
        done = command(*arguments, f"out={cut}")
        assert "going on from step 17" in done.stderr, done.stderr
        assert_same_run(whole, cut)
    plain, ddp = only_record(tmp_path / "plain"), only_record(tmp_path / "ddp")
    assert ddp.curve.loss == pytest.approx(plain.curve.loss, abs=5e-6)


def test_it_is_part_of_a_runs_identity_where_it_is_asked_for():
    ids = {
        RunSpec.from_config(compose_config([*TINY, f"training.group_by_length={on}"])).id for on in ("true", "false")
    }
    assert len(ids) == 2 and RunSpec.from_config(compose_config(TINY)).id in ids
