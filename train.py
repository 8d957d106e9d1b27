"""One run of the suite: `python train.py method=mora task=gsm8k r=256`. Keys: `python train.py --help`."""

from omegaconf import DictConfig

from mora_repro.spec import RUN, entry


def job(config: DictConfig) -> int:
    from mora_repro.start import main  # torch and transformers: not for --help

    return main(config)


if __name__ == "__main__":
    entry(RUN, job)
