"""Training with transformers' Trainer and DeepSpeed: processes, checkpoints, merges, resume, progress."""

from .launch import build_extensions, launch, load_extensions, processes_wanted, report_error
from .loggers import logger_callback
from .train import Collator, Outcome, batch_shape, steps_of, train, training_arguments

__all__ = [
    "Collator",
    "Outcome",
    "batch_shape",
    "build_extensions",
    "launch",
    "load_extensions",
    "logger_callback",
    "processes_wanted",
    "report_error",
    "steps_of",
    "train",
    "training_arguments",
]
