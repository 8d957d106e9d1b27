"""What runs take, beforehand: `python scripts/plan.py table=1 gpu=a100-80gb nodes=2x8 price=2.0`. Keys: `--help`."""

from omegaconf import DictConfig

from mora_repro.spec import CONF, entry


def job(config: DictConfig) -> int:
    from mora_repro.plan import main  # torch and transformers: not for --help

    return main(config)


if __name__ == "__main__":
    entry(CONF / "scripts" / "plan.yaml", job)
