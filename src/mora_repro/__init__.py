"""Reproduction suite for the paper MoRA (arXiv 2405.12130). The tuner itself is the package `mora`.

The folders stand in the order of the data's way: spec, data, methods, training, evaluation, results,
report. A folder imports only from those before it; `run.py` joins them into one run.
"""

import atexit
import gc
import os
import sys
from importlib import import_module
from types import ModuleType

# Tensors at mini scale are small; a warning about forked tokenizers helps nobody.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def imported(name: str) -> ModuleType:
    """The module of that name; the first time without the garbage collector, which has no garbage to find.

    It would look at the objects of torch and transformers again and again, also when the process ends, which together
    takes more than a second.
    """
    if name in sys.modules:
        return sys.modules[name]
    was_on = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        if "triton" in sys.modules:  # which tells of every object that is left when the process ends
            atexit.register(gc.unfreeze)
        if was_on:
            gc.enable()
