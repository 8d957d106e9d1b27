"""What a trained model is worth: greedy answers to a task's questions, scored by the task."""

from .generation import answer, evaluate, prompt_room

__all__ = ["answer", "evaluate", "prompt_room"]
