"""The singular values of what runs changed: `python scripts/spectrum.py run=<id>`. Keys: `--help`."""

from mora_repro.spec import CONF, entry

if __name__ == "__main__":
    entry(CONF / "scripts" / "spectrum.yaml", "mora_repro.spectrum")
