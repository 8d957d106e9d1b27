"""A run's weights for others: `python scripts/export.py run=<id> merge=true`. Keys: `--help`."""

from omegaconf import DictConfig

from mora_repro.spec import CONF, entry


def job(config: DictConfig) -> int:
    from mora_repro.export import main  # torch and transformers: not for --help

    return main(config)


if __name__ == "__main__":
    entry(CONF / "scripts" / "export.yaml", job)
