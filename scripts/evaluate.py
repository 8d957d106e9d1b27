"""Scores a run's weights or any model: `python scripts/evaluate.py run=<id>`. Keys: `--help`."""

from mora_repro.spec import CONF, entry

if __name__ == "__main__":
    entry(CONF / "scripts" / "evaluate.yaml", "mora_repro.scoring")
