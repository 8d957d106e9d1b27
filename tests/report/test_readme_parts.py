"""The generated parts of a README."""

from mora_repro.report import readme

HEAD, END = "<!-- generated: table.md -->\n", "<!-- end -->\n"


def test_a_part_between_two_comments_becomes_its_file_and_the_rest_stays(tmp_path):
    (tmp_path / "table.md").write_text("| a |\n")
    once = readme.filled(f"before\n{HEAD}old\n{END}between\n{HEAD}{END}", tmp_path)
    part = f"{HEAD}\n| a |\n\n{END}"
    assert once == f"before\n{part}between\n{part}"
    assert readme.filled(once, tmp_path) == once
