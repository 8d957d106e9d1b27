"""A run's weights for others: `python scripts/export.py run=<id> merge=true`. Keys: `--help`."""

from mora_repro.spec import CONF, entry

if __name__ == "__main__":
    entry(CONF / "scripts" / "export.yaml", "mora_repro.export")
