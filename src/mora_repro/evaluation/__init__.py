"""Measuring a model: questions answered by generation, lm-eval in process, perplexity."""

from .generation import answer, ask, prompt_room
from .measure import evaluate, refuse_no_room
from .scores import ENOUGH

__all__ = ["ENOUGH", "answer", "ask", "evaluate", "prompt_room", "refuse_no_room"]
