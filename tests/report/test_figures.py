"""Figures draw every run that is there, and name those that are not."""

import matplotlib.pyplot as plt
import pytest
from results.made import record

from mora_repro.report import figures
from mora_repro.report.figures import save
from mora_repro.results.records import Spectrum
from mora_repro.spec.table import load_table


def draw(name, scale, records):
    drawn = figures.draw(name, scale, records)
    assert drawn is not None
    return drawn


def records_of(name, seeds, leave_out=()):
    cells = [cell for cell in load_table(name).cells("mini") if cell.name not in leave_out]
    return [record(cell, seed, [1] * 4, loss=1.0 + seed) for cell in cells for seed in range(seeds)]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("figure2", ["FFT", *(f"LoRA r={r}" for r in (2, 4, 8, 16, 32, 64))]),
        ("figure3", ["FFT", "LoRA r=4", "MoRA r=4", "LoRA r=32", "MoRA r=32"]),
    ],
)
def test_every_curve_has_its_rank_and_a_line_of_its_own(name, labels):
    figure, missing = draw(name, "mini", records_of(name, seeds=1))
    [axes] = figure.axes
    assert [line.get_label() for line in axes.lines] == labels and missing == []
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
    # In grey too: the dashes alone tell them apart.
    assert len({str(line._unscaled_dash_pattern) for line in axes.lines}) == len(labels)
    assert "4 steps" in axes.get_ylabel() and "mini" in axes.get_title()
    assert "One seed." in figure.get_supxlabel()
    plt.close(figure)


def test_the_line_is_the_mean_over_seeds_and_the_band_their_range():
    figure, _ = draw("figure3", "mini", records_of("figure3", seeds=3))
    [axes] = figure.axes
    assert axes.lines[0].get_ydata() == pytest.approx([2.0] * 300)  # losses of 1, 2 and 3
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1.0, 3.0))
    assert "mean over 3 seeds; band: smallest to largest" in figure.get_supxlabel()
    plt.close(figure)


def test_the_loss_is_averaged_over_an_epoch():
    [made] = records_of("figure3", 1, leave_out=("LoRA r=4", "MoRA r=4", "LoRA r=32", "MoRA r=32"))
    loss = [1.0] * 300
    loss[149] = 5.0
    made = made.model_copy(update={"curve": made.curve.model_copy(update={"loss": loss})})
    figure, _ = draw("figure3", "mini", [made])
    shown = figure.axes[0].lines[0].get_ydata()
    assert sorted(shown)[-5:] == [1.0, 2.0, 2.0, 2.0, 2.0]
    plt.close(figure)


def test_what_has_not_run_is_named_and_the_rest_keeps_its_style():
    whole, _ = draw("figure2", "mini", records_of("figure2", seeds=1))
    part, missing = draw("figure2", "mini", records_of("figure2", seeds=1, leave_out=("LoRA r=2", "LoRA r=16")))
    assert missing == ["LoRA r=2", "LoRA r=16"]
    assert "Not run: LoRA r=2, LoRA r=16." in part.get_supxlabel()
    colours = [{line.get_label(): line.get_color() for line in figure.axes[0].lines} for figure in (whole, part)]
    assert len(colours[1]) == 5 and colours[1].items() <= colours[0].items()
    plt.close(whole)
    plt.close(part)


def test_the_same_records_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save(draw("figure3", "mini", records_of("figure3", seeds=2))[0], tmp_path / name / "figure3-mini")
    for suffix in ("png", "svg", "pdf"):
        first, second = ((tmp_path / name / f"figure3-mini.{suffix}").read_bytes() for name in ("a", "b"))
        assert first == second and len(first) > 5000
    assert b"CreationDate" not in first
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        f"figure3-mini.{suffix}" for suffix in ("pdf", "png", "svg")
    ]


def test_a_figure_without_a_run_is_not_drawn():
    assert figures.draw("figure2", "mini", []) is None
    assert figures.draw("figure5", "mini", []) is None


def test_figure_5_has_a_bar_per_method_and_kind_of_layer_the_mean_over_layers_and_seeds():
    cells = {cell.name: cell for cell in load_table("figure5").cells("mini")}
    made = []
    for name, counts in {"LoRA r=16": [4, 8], "MoRA r=16": [30, 50]}.items():
        for seed in (0, 1):
            above = {"q_proj": [count + 2 * seed for count in counts], "down_proj": [1, 1]}
            one = record(cells[name], seed, [10.0], metric="perplexity")
            made.append(one.model_copy(update={"spectrum": Spectrum(threshold=0.1, above=above)}))
    made.append(record(cells["ReLoRA r=16"], 0, [10.0], metric="perplexity"))  # it ran, and was not counted
    figure, missing = draw("figure5", "mini", made)
    [axes] = figure.axes
    assert [[bar.get_height() for bar in bars] for bars in axes.containers] == [[7.0, 1.0], [41.0, 1.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["LoRA r=16", "MoRA r=16"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "down"]
    assert missing == ["ReLoRA r=16", "ReMoRA r=16"] and "2 seeds" in figure.get_supxlabel()
    plt.close(figure)
