"""Measuring a model: questions answered by generation, lm-eval in process, perplexity."""

from .generation import answer, ask, prompt_room
from .measure import evaluate, fetch, refuse_no_room
from .scores import ENOUGH, scored

__all__ = ["ENOUGH", "answer", "ask", "evaluate", "fetch", "prompt_room", "refuse_no_room", "scored"]
