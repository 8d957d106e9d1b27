"""A table in its three forms and in the terminal says what the records say, and no more."""

import io
import math
import re

import pandas as pd
import pytest
from results.made import THREE_SEEDS, record, searched, table_records
from rich.console import Console

from mora_repro.report import tables
from mora_repro.report.terminal import grid
from mora_repro.results.search import grid as tried_at
from mora_repro.spec.table import Cell, load_table

STEPS = (75, 150, 225, 300)


def rows_of(markdown: str) -> list[list[str]]:
    """The table's rows, without its head."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_csv_is_the_records_in_full_precision():
    value = 100 / 3
    records = table_records({**THREE_SEEDS, ("lora", 4): [value, 20.0, 24.0], ("mora", 32): [61.25]})
    read = pd.read_csv(io.StringIO(tables.csv(tables.build("2", "mini", records)))).set_index(["method", "r", "step"])
    assert len(read) == 5 * 4 and set(read.metric) == {"char_accuracy"} and set(read.task) == {"uuid"}
    deviation = pd.Series([value, 20.0, 24.0]).std()
    for step, paper in zip(STEPS, (9.9, 10.0, 10.7, 54.2), strict=True):  # the paper's r=8 beside our r=4
        lora = read.loc[("lora", 4, step)]
        assert lora["mean"] == math.fsum([value, 20.0, 24.0]) / 3 and lora.n == 3 and lora.paper == paper
        assert lora.high - lora["mean"] == pytest.approx(4.302653 * deviation / 3**0.5)
        assert lora.difference == pytest.approx(lora["mean"] - paper)
        assert lora.records.split() == [each.id for each in records if each.spec.method.name == "lora"][:3]
        mora = read.loc[("mora", 32, step)]
        assert (mora["mean"], mora.n) == (61.25, 1) and math.isnan(mora.low) and math.isnan(mora.high)
    assert [read.loc[("mora", 32, step)].paper for step in STEPS] == [41.6, 100, 100, 100]


def test_the_table_shows_mean_and_interval_and_bold_leaders():
    text = tables.markdown(tables.build("2", "mini", table_records(THREE_SEEDS)))
    fft, lora, *_ = rows_of(text)
    assert fft == ["FFT", "-", "700,000", "3", *["**91.0 ± 2.5**"] * 4, "42.5", "100.0", "100.0", "100.0"]
    assert lora == ["LoRA", "4", "4,000", "3", *["22.0 ± 5.0"] * 4, "9.9", "10.0", "10.7", "54.2"]
    assert text.count("**") == 8
    caption = text.splitlines()[0]
    for part in ("seeds 0, 1, 2", "95 % t-interval", "r=4 stands for r=8", "order", "Holm"):
        assert part in caption
    assert "Not run" not in caption and "†" not in text


def test_one_seed_has_no_interval_and_no_bold():
    text = tables.markdown(tables.build("2", "mini", table_records({cell: v[:1] for cell, v in THREE_SEEDS.items()})))
    assert "**" not in text and "Bold" not in text and "one seed (0), so without intervals" in text
    assert [row[4] for row in rows_of(text)] == ["90.0", "20.0", "50.0", "60.0", "61.0"]


def test_missing_rows_are_shown_as_missing():
    table = tables.build("2", "mini", table_records({("fft", None): [90.0, 91.0], ("lora", 32): [1.0, 2.0]}))
    rows = rows_of(tables.markdown(table))
    assert rows[1] == ["LoRA", "4", "-", "0", *["not run"] * 4, "9.9", "10.0", "10.7", "54.2"]
    assert "Not run: 3 of 5 cells (LoRA r=4, MoRA r=4, MoRA r=32)." in tables.caption(table)
    missing = pd.read_csv(io.StringIO(tables.csv(table))).iloc[4]
    assert (missing.method, missing.n) == ("lora", 0) and math.isnan(missing["mean"]) and pd.isna(missing.records)


def test_rows_that_have_not_searched_beside_one_that_has_are_named():
    lora, mora = Cell("lora", 4, "uuid", "mini"), Cell("mora", 4, "uuid", "mini")
    plain = [record(lora, 0, [20.0] * 4)]
    assert "recipes" not in tables.caption(tables.build("2", "mini", plain))
    caption = tables.caption(tables.build("2", "mini", [*plain, *searched(mora)]))
    assert "At the rates of their recipes, where others have searched theirs: 1 of 5 cells (LoRA r=4)." in caption
    assert "recipes" not in tables.caption(tables.build("2", "mini", [*searched(lora), *searched(mora)]))


def test_no_row_is_bold_where_some_have_searched_and_others_have_not():
    fft = Cell("fft", None, "uuid", "mini")
    tries = [made for made in searched(fft) if made.spec.seed]
    best = fft.with_settings(tried_at(fft)[-1])
    runs = [record(best, seed, [value] * 4) for seed, value in enumerate(THREE_SEEDS["fft", None])]
    others = {cell: values for cell, values in THREE_SEEDS.items() if cell != ("fft", None)}
    text = tables.markdown(tables.build("2", "mini", [*tries, *runs, *table_records(others)]))
    assert "91.0 ± 2.5" in text and "**" not in text and "rows that have all searched" in text


def test_a_row_of_several_ranks_has_no_one_number_of_parameters():
    cells = load_table("4").cells("mini")
    view = tables.build("4", "mini", [record(cell, 0, [1.0, 2.0], metric="exact_match") for cell in cells])
    assert {row[1] for row in rows_of(tables.markdown(view))} == {"-"}
    assert sorted(set(tables.data(view).trainable)) == [4_000, 32_000]


@pytest.mark.parametrize(("trainable", "marked"), [(4080, False), (3920, False), (4081, True), (3919, True)])
def test_a_row_off_loras_budget_by_more_than_two_percent_is_marked(trainable, marked):
    _, lora, mora, *_ = load_table("2").cells("mini")
    records = [record(lora, 0, [1] * 4, trainable=4000), record(mora, 0, [1] * 4, trainable=trainable)]
    table = tables.build("2", "mini", records)
    assert [line.off_budget for line in table.lines] == [False, False, marked, False, False]
    assert (f"{trainable:,} †" in tables.markdown(table)) == marked
    assert ("more than 2 % off" in tables.caption(table)) == marked


def test_at_paper_scale_the_steps_are_the_paper_s_and_nothing_stands_for_another_rank():
    table = tables.build("2", "paper", table_records({("lora", 8): [10.0], ("mora", 256): [99.0]}, "paper"))
    assert table.titles == ["300", "500", "700", "900"]
    assert "scales differ" not in tables.caption(table) and "scale paper, LLaMA-2 7B; one" in tables.caption(table)
    assert [entry.paper for entry in table.lines[2].entries] == [10.1, 15.7, 87.4, 100]


def test_every_number_of_the_paper_stands_in_a_table():
    """Each of its tables, at the paper's scale, has all its values, where they belong."""
    for name, columns in (("1", 6), ("2", 4), ("3", 2), ("4", 2), ("6", 5), ("7", 6)):
        view = tables.build(name, "paper", [])
        reported = [row["values"] for row in tables.paper_results()[f"table{name}"]["rows"]]
        assert len(view.columns) == columns
        assert [[entry.paper for entry in line.entries] for line in view.lines] == reported, name


def test_the_latex_is_well_formed():
    text = tables.latex(tables.build("2", "mini", table_records(THREE_SEEDS)))
    environments = re.findall(r"\\(begin|end)\{(\w+)\}", text)
    assert environments == [("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table")]
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert text.isascii() and not re.search(r"(?<!\\)[&%](?!\s)", text)
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    columns = len(re.search(r"\\begin\{tabular\}\{(l?r+)\}", text)[1])
    assert len(body) == 5
    assert all(line.endswith(r"\\") and len(re.findall(r"(?<!\\)&", line)) == columns - 1 for line in body)
    assert body[0].count(r"\textbf{91.0 $\pm$ 2.5}") == 4 and text.count(r"\textbf") == 4
    assert r"\toprule" in text and r"\cmidrule(lr){5-8} \cmidrule(lr){9-12}" in text


def test_characters_that_latex_reads_as_commands_are_escaped():
    assert "a_b & 5 % {x} \\".translate(tables._LATEX) == r"a\_b \& 5 \% \{x\} \textbackslash{}"


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_the_terminal_s_table_fits_and_cuts_nothing(width, scale):
    wide = {cell: [v[0], v[0] + 9.4] for cell, v in THREE_SEEDS.items() if cell != ("lora", 32)}
    names = {4: 8, 32: 256, None: None}
    accuracy = wide if scale == "mini" else {(method, names[r]): v for (method, r), v in wide.items()}
    table = tables.build("2", scale, table_records(accuracy, scale))
    console = Console(width=width, file=io.StringIO())
    console.print(grid(table, console.width))
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    [missing] = [line for line in text.splitlines() if "not run" in line and "LoRA" in line]
    assert missing.split() == [
        "LoRA",
        f"r={table.lines[3].r}",
        "-",
        "not",
        "run",
        *"----",
        "9.9",
        "70.6",
        "100.0",
        "100.0",
    ]
    means = [line for line in text.splitlines() if line.strip().startswith("FFT")]
    assert len(means) == 1 and means[0].count("94.7") == 4
    assert text.count("±59.7") == 16  # 12.706205 * 9.4 / 2


def test_bold_in_the_terminal_is_the_table_s():
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system=None, no_color=True)
    segments = console.render(grid(tables.build("2", "mini", table_records(THREE_SEEDS)), 100))
    bold = [s.text.strip() for s in segments if s.style and s.style.bold and "." in s.text and "91" in s.text]
    assert len(bold) == 4


def test_runs_from_different_bases_are_said_to_be():
    lora = Cell("lora", 4, "uuid", "mini")
    same = [record(lora, seed, [1, 2, 3, 4], base_sha256="a") for seed in (0, 1)]
    other = record(lora, 1, [1, 2, 3, 4], base_sha256="b")
    assert "base weights" not in tables.markdown(tables.build("2", "mini", same))
    mixed = tables.build("2", "mini", [same[0], other])
    assert "from 2 different sets of base weights" in tables.caption(mixed)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(grid(mixed, 120))
    assert "2 different sets of base weights" in console.export_text()
