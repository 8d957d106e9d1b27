"""scripts/report.py as a user meets it."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from results.made import THREE_SEEDS, record, table_records

from mora_repro.errors import UserError
from mora_repro.report.write import main
from mora_repro.results.records import Store
from mora_repro.spec.table import Cell, load_table

FILES = [
    *(f"figures/figure{n}-mini.{suffix}" for n in (2, 3) for suffix in ("pdf", "png", "svg")),
    *(
        f"tables/{name}-mini.{suffix}"
        for name in ("table2", "tasks", "operators", "magnitude")
        for suffix in ("csv", "md", "tex")
    ),
    *(f"tables/{name}-mini.{suffix}" for name in ("table5", "verdicts") for suffix in ("csv", "md")),
    "report.html",
]


def report(out, scale=None):
    return main(OmegaConf.create({"out": str(out), "scale": scale, "peers": None, "readme": None}))


def written(out):
    files = [path for folder in ("figures", "tables") for path in sorted((out / folder).glob("*"))]
    files += [path for path in [out / "report.html"] if path.exists()]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def save(out, records):
    for each in records:
        Store(out).save(each)


def test_it_writes_all_files_and_the_same_bytes_again(tmp_path, capsys):
    save(tmp_path, table_records(THREE_SEEDS))
    assert report(tmp_path) == 0
    first = written(tmp_path)
    assert sorted(first) == sorted(FILES)
    said = capsys.readouterr().out
    assert "Table 2" in said and "MoRA memorises faster" in said and "14 of 19 claims have no runs yet" in said
    assert f"{tmp_path}/tables/table2-mini.md" in said
    assert "(not run: LoRA r=2, LoRA r=8, LoRA r=16, LoRA r=64)" in said
    assert report(tmp_path) == 0
    assert written(tmp_path) == first


def test_a_try_of_the_search_changes_no_table_and_no_figure(tmp_path):
    save(tmp_path, table_records(THREE_SEEDS))
    report(tmp_path)
    before = written(tmp_path)
    lora = Cell("lora", 4, "uuid", "mini")
    save(tmp_path, [record(lora, 100, [99] * 4), record(lora, 0, [99] * 4, overrides=["lr=3.3e-3"])])
    report(tmp_path)
    after = written(tmp_path)
    assert after.pop("report.html") != before.pop("report.html")  # it shows all tries
    assert after == before


def test_each_scale_has_files_of_its_own(tmp_path):
    save(tmp_path, [*table_records(THREE_SEEDS), *table_records({("lora", 8): [3.0]}, "paper")])
    report(tmp_path)
    both = written(tmp_path)
    # At scale paper LoRA alone has run, and no operator.
    paper = [name.replace("mini", "paper") for name in FILES if "-mini" in name and "operators" not in name]
    assert sorted(both) == sorted([*FILES, *paper])
    assert b"mini-uuid" not in both["tables/table2-paper.csv"] and b"paper-uuid" not in both["tables/table2-mini.csv"]


def test_a_corrupt_record_is_named_and_left_out(tmp_path, capsys):
    save(tmp_path, table_records(THREE_SEEDS))
    broken = Store(tmp_path).record_path("mini-uuid-fft-s9-broken")
    broken.write_text('{"id": ')
    assert report(tmp_path) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert str(broken) in line and "left out" in line


@pytest.mark.parametrize("scale", [None, "mini"])
def test_without_records_it_says_what_to_run(tmp_path, scale):
    with pytest.raises(UserError, match=f"python scripts/sweep.py table=2 scale=mini seeds=3 out={tmp_path}"):
        report(tmp_path, scale)
    save(tmp_path, [record(Cell("lora", 4, "uuid", "mini"), 0, [9] * 4, overrides=["lr=3.3e-3"])])
    with pytest.raises(UserError, match=r"no finished run.*1 other record"):
        report(tmp_path, scale)
    assert not (tmp_path / "tables").exists()


def test_an_unknown_scale_and_an_unknown_table_name_what_is_near(tmp_path):
    with pytest.raises(UserError, match=r"scale=papr is not known\. Did you mean paper"):
        report(tmp_path, "papr")
    with pytest.raises(UserError, match=r"table=figur2 is not known\. Did you mean figure2"):
        load_table("figur2")


@pytest.mark.parametrize("folder", ["tables", "figures"])
def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path, folder):
    save(tmp_path, table_records(THREE_SEEDS))
    (tmp_path / folder).write_text("a file where the folder should be")
    with pytest.raises(UserError, match="can't be written"):
        report(tmp_path)


def test_the_report_needs_no_torch():
    code = "import mora_repro.report.write, sys; sys.exit(bool({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command(command_here, tmp_path):
    save(tmp_path, table_records(THREE_SEEDS))
    done = command_here("scripts/report.py", f"out={tmp_path}", "scale=mini")
    assert "MoRA memorises faster" in done.stdout and done.stderr == ""
    assert max(map(len, done.stdout.splitlines()[:20])) <= 80
    failed = command_here("scripts/report.py", f"out={tmp_path}", "scale=paper", check=False)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ")
