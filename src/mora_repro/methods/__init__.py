"""From a RunSpec to a trainable model: the base model, its tokenizer, and the method on top."""

from .base import (
    computes_in_bf16,
    download,
    is_gguf,
    load_base,
    load_tokenizer,
    on_meta_device,
    precision,
    refuse_too_long,
)
from .memory import needed_gb, refuse_what_does_not_fit
from .method import apply_method, changes_base, count_parameters

__all__ = [
    "apply_method",
    "changes_base",
    "computes_in_bf16",
    "count_parameters",
    "download",
    "is_gguf",
    "load_base",
    "load_tokenizer",
    "needed_gb",
    "on_meta_device",
    "precision",
    "refuse_too_long",
    "refuse_what_does_not_fit",
]
