"""The singular values of what runs changed: `python scripts/spectrum.py run=<id>`. Keys: `--help`."""

from omegaconf import DictConfig

from mora_repro.spec import CONF, entry


def job(config: DictConfig) -> int:
    from mora_repro.spectrum import main  # torch and transformers: not for --help

    return main(config)


if __name__ == "__main__":
    entry(CONF / "scripts" / "spectrum.yaml", job)
