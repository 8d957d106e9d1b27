"""A sweep on a Slurm cluster: `python scripts/sweep.py table=1 scale=paper launcher=slurm profile=<name>`.

What is submitted stands in `<out>/sweeps/<name>/`: manifest.json, the scripts of its jobs and their logs. Arrays train,
grouped by what their runs take; after them comes a job that writes the report or, where rates are searched, one that
chooses from the records, submits what follows, and a next one of its kind. Nothing waits on the login node.
"""
