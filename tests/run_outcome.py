"""What came out of a run: its record and its weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from mora_repro.results.records import Record, Store


def only_record(out: Path) -> Record:
    [record] = Store(out).load_all()[0]
    return record


def weights(out: Path) -> dict[str, torch.Tensor]:
    [path] = (out / "work").glob("*/model/*.safetensors")
    return load_file(path)


def assert_same_run(first: Path, second: Path) -> None:
    """The same numbers to the bit."""
    one, two = only_record(first), only_record(second)
    assert one.status == two.status == "finished"
    assert one.id == two.id
    assert one.curve == two.curve and one.evaluations == two.evaluations and one.metrics == two.metrics
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
