"""One run of the suite: `python train.py method=mora task=gsm8k r=256`. Keys: `python train.py --help`."""

from mora_repro.spec import entry


def job(config) -> int:
    from mora_repro.run import main  # torch and transformers: not for --help

    return main(config)


if __name__ == "__main__":
    entry("config", job)
