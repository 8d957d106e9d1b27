"""Scores a run's weights or any model: `python scripts/evaluate.py run=<id>`. Keys: `--help`."""

from omegaconf import DictConfig

from mora_repro.spec import CONF, entry


def job(config: DictConfig) -> int:
    from mora_repro.scoring import main  # torch and transformers: not for --help

    return main(config)


if __name__ == "__main__":
    entry(CONF / "scripts" / "evaluate.yaml", job)
