"""One run of the suite: `python train.py method=mora task=gsm8k r=256`. Keys: `python train.py --help`."""

from mora_repro.spec import RUN, entry

if __name__ == "__main__":
    entry(RUN, "mora_repro.start")
