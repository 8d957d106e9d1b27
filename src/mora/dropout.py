"""Dropout whose mask is computed again for the backward pass, in place of being kept.

`torch.nn.functional.dropout` keeps its mask, which on a CPU is as large as its input, and draws it by a generator that
takes longer than the adapter's other work. Here a mask is a function of one seed: of every four values, the bits are
those of one 64-bit hash, 16 for each. What is hashed is the sequence of SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", 2014); the hash is two multiplications between xors with the upper half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LEVELS = 1 << 16  # p is rounded to a multiple of 1 / LEVELS
VALUES = 4  # of one hash of 64 bits
STEP, FACTOR = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
_ROW = 1 << 12


def _signed(value: int) -> int:
    """The 64-bit integer of these bits, as torch holds it."""
    return value - (1 << 64) if value >> 63 else value


@dataclass(frozen=True)
class Mask:
    """Which values are kept: each with probability 1 - p, on its own.

    Args:
        seed: any 64-bit integer; the same seed gives the same mask of a shape.
        p: the probability that a value is dropped, at least 0 and below 1; taken to the nearest 1 / 65,536.
    """

    seed: int
    p: float

    @staticmethod
    def drawn(p: float) -> Mask:
        """One with a seed of torch's generator of the CPU, so that `torch.manual_seed` and checkpoints hold for it."""
        return Mask(int(torch.randint(torch.iinfo(torch.int64).max, (), device="cpu")), p)

    @cached_property
    def dropped(self) -> int:
        """p in units of 1 / LEVELS; at most LEVELS - 1, so that something is kept."""
        return min(round(self.p * LEVELS), LEVELS - 1)

    @cached_property
    def scale(self) -> float:
        """What the kept values are multiplied by, so that the expectation is that without dropout."""
        return LEVELS / (LEVELS - self.dropped)

    def of(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """1 where a value is kept and 0 where it is dropped, of that shape, in `like`'s dtype and on its device."""
        kept = like.new_empty(shape)
        bits = _bits(self.seed, kept.numel(), like.device).view(shape)
        return torch.ge(bits, self.dropped - LEVELS // 2, out=kept)


def _bits(seed: int, count: int, device: torch.device) -> Tensor:
    """So many 16-bit integers, each uniform over all 65,536."""
    rows, step, factor = torch.arange(-(-count // (VALUES * _ROW)), device=device), _signed(STEP), _signed(FACTOR)
    hashed = (rows * _ROW * step + seed)[:, None] + torch.arange(_ROW, device=device) * step  # modulo 2^64
    low, high = hashed.view(torch.int32).unflatten(-1, (_ROW, 2)).unbind(-1)
    for _ in range(2):
        low.bitwise_xor_(high)
        hashed.mul_(factor)
    low.bitwise_xor_(high)
    return hashed.flatten().view(torch.int16)[:count]
