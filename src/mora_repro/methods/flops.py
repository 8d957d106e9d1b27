"""How much arithmetic a training takes.

A multiplication with its addition is two FLOPs. For a token, a weight matrix of P values takes 2 P forwards, 2 P for
the gradient of its input, and 2 P for its own where it is trained. So with all weights trained it is the 6 P of Kaplan
et al. 2020 (arXiv 2001.08361, section 2.1), and a frozen one takes 4 P: its own gradient is left out, the one that goes
on to the layers below is not. What an adapter takes is counted on the meta device (probe.py). Attention takes 4 s a
forwards and twice that backwards for a token among s, a being the heads' width (Chowdhery et al. 2022, arXiv
2204.02311, appendix B: 12 L H Q T; as there, what a causal mask would save is not taken off). Gradient checkpointing
computes the layers' forward passes once more. Lookups, norms and the optimizer are left out: they take memory's time
rather than arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..spec import RunSpec
from .memory import probes
from .probe import decoder


@dataclass(frozen=True)
class Flops:
    """FLOPs of a micro-batch; `recomputed` is the layers' forward pass, once more."""

    forward: int
    backward: int
    recomputed: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recomputed


def flops(spec: RunSpec, model: nn.Module, samples: int, length: int) -> Flops:
    """Of a micro-batch of `samples` x `length` tokens.

    Args:
        model: with the method applied, on the meta device.
    """
    base, config, layers = decoder(model)
    length += (spec.method.peft or {}).get("num_virtual_tokens", 0)
    tokens = samples * length
    heads = config.num_attention_heads
    attention = 4 * tokens * length * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    linears = probes(spec, model, samples, length).values()
    forward = len(layers) * (attention + sum(each.forward for each in linears))
    backward = len(layers) * (2 * attention + sum(each.backward for each in linears))
    output = base.get_output_embeddings()
    head = 2 * tokens * config.hidden_size * config.vocab_size
    trained = any(p.requires_grad for p in output.parameters())
    return Flops(
        forward=forward + head,
        backward=backward + head * (2 if trained else 1),
        recomputed=forward if spec.trainer.gradient_checkpointing else 0,
    )
