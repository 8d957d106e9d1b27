"""Run every command that README.md shows behind a `$`, in order, in the project's environment."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DONE_BEFORE = {"make test"}  # by .ci/run

environment = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
commands = re.findall(r"^\$ (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
if not commands:
    sys.exit("README.md shows no command")
for command in commands:
    if command not in DONE_BEFORE:
        print(f"README: {command}", flush=True)
        subprocess.run(command, shell=True, check=True, cwd=ROOT, env=environment)
