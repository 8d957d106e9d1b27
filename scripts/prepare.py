"""What a run needs, ahead of time: `python scripts/prepare.py task=gsm8k model=llama2_7b show=3`. Keys: `--help`."""

from mora_repro.spec import CONF, entry

if __name__ == "__main__":
    entry(CONF / "prepare.yaml", "mora_repro.prepare")
