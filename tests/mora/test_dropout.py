"""The masks of dropout: as random as they should be, and the same again from the same seed."""

import pytest
import torch
from scipy import stats

from mora.dropout import LEVELS, Mask, _bits


def mask(seed: int, p: float, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return Mask(seed, p).of(shape, torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**62, -5])
def test_so_many_values_are_dropped_in_all_and_of_every_residue(p, seed):
    dropped = 1 - mask(seed, p, 1 << 20).double()
    for lanes in (1, 3, 4, 16384):  # four values share a hash, 16,384 a row of them
        counts = dropped[: len(dropped) // lanes * lanes].view(-1, lanes).sum(dim=0)
        each = len(dropped) // lanes
        chance = stats.binomtest(int(counts.sum()), each * lanes, p).pvalue
        spread = stats.chi2.sf(((counts - each * p) ** 2 / (each * p * (1 - p))).sum().item(), lanes)
        assert min(chance, spread) > 1e-4


def test_values_and_masks_of_other_seeds_do_not_hang_together():
    one, other = (mask(seed, 0.5, 1 << 20).double() * 2 - 1 for seed in (7, 8))
    for lag in (1, 2, 3, 4, 8, 1024, 4096, 16384):
        assert abs((one[:-lag] * one[lag:]).sum().item()) < 4.5 * len(one) ** 0.5
    assert abs((one * other).sum().item()) < 4.5 * len(one) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_is_ones_and_zeros_of_its_seed_in_any_dtype_and_shape(dtype):
    made = mask(3, 0.3, 7, 11, dtype=dtype)
    assert made.dtype == dtype and made.shape == (7, 11)
    assert torch.equal(made.double(), mask(3, 0.3, 77).view(7, 11).double())
    assert set(made.unique().tolist()) == {0.0, 1.0}
    assert mask(3, 0.3, 0, 5, dtype=dtype).shape == (0, 5)


def test_the_seed_is_of_torchs_generator():
    torch.manual_seed(4)
    first, second = Mask.drawn(0.1), Mask.drawn(0.1)
    torch.manual_seed(4)
    assert first == Mask.drawn(0.1) and first != second


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 1e-7, 1 - 1e-7])
def test_the_scale_keeps_the_expectation_of_the_rounded_p(p):
    made = Mask(0, p)
    assert abs(made.dropped / LEVELS - p) <= 1 / LEVELS
    assert made.scale * (1 - made.dropped / LEVELS) == pytest.approx(1)


def test_the_bits_are_those_of_the_hash():
    def hashed(index: int) -> int:
        x = (7 + index * 0x9E3779B97F4A7C15) % 2**64
        for _ in range(2):
            x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 % 2**64
        return x ^ x >> 32

    assert hashed(0) == 8736873150706563146 and hashed(1) == 15772674590947786541
    bits = _bits(7, 4 * 5000 + 3, torch.device("cpu"))
    assert len(bits) == 20_003
    for index in (0, 1, 4095, 4096, 5000):
        expected = [hashed(index) >> 16 * lane & 0xFFFF for lane in range(4)]
        assert [value % 2**16 for value in bits[4 * index : 4 * index + 4].tolist()] == expected[: 4 - index // 5000]


def test_the_seed_is_drawn_on_the_cpu_whatever_the_default_device():
    torch.manual_seed(4)
    expected = Mask.drawn(0.1)
    torch.manual_seed(4)
    with torch.device("meta"):
        assert Mask.drawn(0.1) == expected
