"""The repository's root, and a run so small that it takes seconds."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A model and a task so small that a run takes seconds; no base is trained first.
TINY = [
    "scale=mini",
    "model.base=null",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=1",
    "model.architecture.num_attention_heads=2",
    "task=uuid",
    "task.pairs=12",
    "training.batch_size=4",
    "training.steps=12",
    "training.schedule=linear",
    "training.decay_steps=null",
    "training.warmup_steps=2",
    "training.evaluate_at=[6]",
    "training.save_every=4",
]
