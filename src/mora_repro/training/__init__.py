"""Training with transformers' Trainer: checkpoints, resume, graceful stop, progress."""

from .train import Outcome, train

__all__ = ["Outcome", "train"]
