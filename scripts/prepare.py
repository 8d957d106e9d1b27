"""What a run needs, ahead of time: `python scripts/prepare.py task=gsm8k model=llama2_7b show=3`. Keys: `--help`."""

from omegaconf import DictConfig

from mora_repro.spec import CONF, entry


def job(config: DictConfig) -> int:
    from mora_repro.prepare import main  # torch and transformers: not for --help

    return main(config)


if __name__ == "__main__":
    entry(CONF / "prepare.yaml", job)
