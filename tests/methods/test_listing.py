"""scripts/methods.py, the committed results/methods.csv, and --help."""

import csv
import runpy
import sys

import pytest
from tiny import ROOT

from mora_repro.methods.listing import methods, write
from mora_repro.spec import compose
from mora_repro.spec.compose import METHODS_CSV, off_budget, options


def committed() -> dict[str, dict[str, str]]:
    with METHODS_CSV.open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_the_committed_list_is_what_is_computed(tmp_path):
    write(tmp_path / "methods.csv", methods())
    assert (tmp_path / "methods.csv").read_text() == METHODS_CSV.read_text(), "make methods writes it anew"


def test_the_list_has_all_methods_and_the_counts_of_the_literature():
    rows = committed()
    assert sorted(rows) == options("method")
    assert rows["lora"]["r8"] == "19988480" and rows["fft"]["r8"] == "6738415616"
    marked = {name for name, row in rows.items() if row["r8"] and off_budget(row, 8)}
    assert {"adalora", "asylora", "dora", "prefix_tuning", "prompt_tuning", "vera"} <= marked
    assert not marked & {"fft", "lora", "mora", "remora", "relora", "adapter", "hira", "randlora"}


def test_help_lists_them_without_importing_torch(command):
    done = command("-X", "importtime", "train.py", "--help")
    for name, row in committed().items():
        [line] = [line for line in done.stdout.splitlines() if line.strip().startswith(f"{name} ")][:1]
        assert row["source"].split(";")[0] in line
        assert f"{int(row['r8']):,}" in line if row["r8"] else " - " in line
    assert "29,985,408†" in done.stdout and "19,988,480 " in done.stdout
    assert not any(line.split("|")[-1].strip() in ("torch", "transformers") for line in done.stderr.splitlines())


def test_a_method_that_is_not_in_the_list_shows_a_dash(monkeypatch, tmp_path):
    monkeypatch.setattr(compose, "METHODS_CSV", tmp_path / "methods.csv")
    assert all(line.split()[1] == "-" for line in compose._methods(8).splitlines())
    assert len(compose._methods(8).splitlines()) == len(options("method"))


def test_the_script_takes_no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/methods.py", "r=8"])
    with pytest.raises(SystemExit, match="takes no arguments, and got r=8"):
        runpy.run_path(str(ROOT / "scripts" / "methods.py"), run_name="__main__")
