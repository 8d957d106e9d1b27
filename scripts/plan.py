"""What runs take, beforehand: `python scripts/plan.py table=1 gpu=a100-80gb nodes=2x8 price=2.0`. Keys: `--help`."""

from mora_repro.spec import CONF, entry

if __name__ == "__main__":
    entry(CONF / "scripts" / "plan.yaml", "mora_repro.plan")
