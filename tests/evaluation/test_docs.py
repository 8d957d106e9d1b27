"""docs/benchmarks.md is what the code makes of it."""

from mora_repro.data.benchmarks import KNOWN
from mora_repro.evaluation.docs import PAGE, page


def test_the_page_of_benchmarks_is_up_to_date():
    assert PAGE.read_text() == page(), "run: make docs"


def test_every_benchmark_has_a_prompt_and_its_gold_answer():
    text = page()
    for name in [*KNOWN, "gsm8k", "math"]:
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert "```text\n" in section and "Gold:" in section and "Columns:" in section, name
