"""Run every command that README.md shows behind a `$`, in order, in the project's environment."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {"make test", "source .venv/bin/activate"}  # .ci/run has done the one, PATH below does the other

environment = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
commands = re.findall(r"^\$ (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
if not commands:
    sys.exit("README.md shows no command")
for command in commands:
    if command not in LEFT_OUT:
        print(f"README: {command}", flush=True)
        subprocess.run(command, shell=True, check=True, cwd=ROOT, env=environment)
