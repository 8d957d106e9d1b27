"""From a RunSpec to a trainable model: the base model, its tokenizer, and the method on top."""

from .base import load_base, load_tokenizer, on_meta_device
from .method import apply_method, count_parameters

__all__ = ["apply_method", "count_parameters", "load_base", "load_tokenizer", "on_meta_device"]
