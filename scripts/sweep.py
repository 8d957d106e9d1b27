"""Run the cells of a table: `python scripts/sweep.py table=2 scale=mini seeds=3`. Keys: `--help`."""

from mora_repro.spec import CONF, entry

if __name__ == "__main__":
    entry(CONF / "scripts" / "sweep.yaml", "mora_repro.sweep")
