"""Reproduction suite for the paper MoRA (arXiv 2405.12130). The tuner itself is the package `mora`.

The folders stand in the order of the data's way: spec, data, methods, training, evaluation, results,
report. A folder imports only from those before it; `run.py` joins them into one run.
"""

import os

# Tensors at mini scale are small; a warning about forked tokenizers helps nobody.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
