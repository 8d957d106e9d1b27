"""Tables and figures from records: `python scripts/report.py out=results`. Keys: `--help`."""

from mora_repro.spec import CONF, entry

if __name__ == "__main__":
    entry(CONF / "scripts" / "report.yaml", "mora_repro.report.write")
