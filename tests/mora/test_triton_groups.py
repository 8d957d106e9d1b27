"""The Triton kernels, on a GPU where there is one and in Triton's interpreter elsewhere, against PyTorch's operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import GROUPINGS, WAYS, dropped
from torch.nn.functional import linear

from mora import Layout, get_operator, kernels
from mora.dropout import Mask
from mora.operators import (
    sharing_compress,
    sharing_compress_adjoint,
    sharing_decompress,
    sharing_decompress_adjoint,
)

pytest.importorskip("triton", reason="Triton isn't installed: pip install -e '.[triton]'")

from mora import triton_groups  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value. A GPU rounds to bf16, and the interpreter cuts.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3, torch.float16: 5e-4}
TOKENS = (1, 3, 40)


@pytest.fixture(autouse=True)
def on_this_device(monkeypatch):
    """kernels.py takes the Triton kernels for tensors of the CPU too."""
    monkeypatch.setattr(
        kernels, "_on_gpu", lambda device, dtype=torch.float32: None if dtype == torch.float64 else triton_groups
    )


@st.composite
def layouts(draw, largest=80):
    k, d = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    size = draw(st.integers(1, min(k, d)))
    return Layout(k, d, size, draw(st.sampled_from(GROUPINGS)), draw(st.sampled_from(GROUPINGS)))


def near(mine, other, dtype):
    assert mine.dtype == dtype and mine.shape == other.shape
    assert (mine.double() - other).abs().max() <= BOUNDS[dtype] * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@settings(deadline=None, derandomize=True, max_examples=25)
@given(layouts(), st.sampled_from(TOKENS), st.integers(0, 2**63 - 1))
def test_sums_and_their_transposes_are_those_of_the_operator(dtype, p, layout, tokens, seed):
    mask = Mask(seed, p) if p else None

    def random(features):
        return torch.randn(tokens, features, device=DEVICE).to(dtype)

    x, g, y, u = random(layout.in_features), random(layout.out_features), random(layout.out_features), random(layout.size)
    ins, outs = (layout.in_grouping, True), (layout.out_grouping, False)
    kept = 1 if mask is None else mask.of(x.shape, x).double()

    near(triton_groups.sum_groups(x, layout.size, *ins, mask), sharing_compress(x.double() * kept, layout), dtype)
    near(triton_groups.sum_groups(g, layout.size, *outs), sharing_decompress_adjoint(g.double(), layout), dtype)
    expected = y.double() + sharing_decompress(u.double(), layout)
    triton_groups.add_to_groups(y, u, *outs, fresh=False)
    near(y, expected, dtype)
    spread = kept * sharing_compress_adjoint(u.double(), layout)
    expected = x.double() + spread
    triton_groups.add_to_groups(x, u, *ins, fresh=False, mask=mask)
    near(x, expected, dtype)
    fresh = torch.full_like(x, float("nan"))
    triton_groups.add_to_groups(fresh, u, *ins, fresh=True, mask=mask)
    near(fresh, spread, dtype)


@pytest.mark.parametrize(("features", "size"), [(300, 260), (1100, 300), (600, 4), (4096, 512)])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_more_groups_than_a_tile_has_and_more_members(features, size, grouping):
    layout, mask = Layout(features, features, size, grouping, grouping), Mask(5, 0.5)
    x = torch.randn(33, features, device=DEVICE)
    expected = sharing_compress(dropped(x, mask).double() / mask.scale, layout)
    near(triton_groups.sum_groups(x, size, grouping, True, mask), expected, torch.float32)
    u = torch.randn(33, size, device=DEVICE)
    expected = x.double() + sharing_decompress(u.double(), layout)
    triton_groups.add_to_groups(x, u, grouping, False, fresh=False)
    near(x, expected, torch.float32)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "folded"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@settings(deadline=None, derandomize=True, max_examples=15)
@given(layouts(), st.sampled_from([(), (3,), (0,), (2, 1, 4)]))
def test_value_and_gradients_are_those_of_the_pair(way, p, layout, batch):
    operator, mask = get_operator("sharing"), Mask(7, p) if p else None
    x = torch.randn(*batch, layout.in_features, device=DEVICE, requires_grad=True)
    m = torch.randn(layout.size, layout.size, device=DEVICE, requires_grad=True)
    weight = torch.randn(layout.out_features, layout.in_features, device=DEVICE)
    expected = linear(x, weight) + operator(dropped(x, mask), m, layout)
    result = WAYS[way](x, weight, None, m, operator, layout, mask)
    gradient = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, (x, m), gradient)
    for mine, other in zip((result, *torch.autograd.grad(result, (x, m), gradient)), (expected, *theirs), strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * max([1.0, *other.abs().flatten().tolist()]))


def test_doubles_are_summed_up_as_doubles():
    assert kernels._on_gpu(torch.device("cuda"), torch.float64) is None


@pytest.mark.gpu
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("features", "size"), [(4096, 256), (4096, 1448), (11008, 348), (11008, 1390)])
def test_at_the_sizes_of_a_real_layer(grouping, dtype, features, size):
    layout, mask = Layout(features, features, size, grouping, grouping), Mask(3, 0.1)
    x = torch.randn(1001, features, device="cuda").to(dtype)
    kept = mask.of(x.shape, x).double()
    near(triton_groups.sum_groups(x, size, grouping, True, mask), sharing_compress(x.double() * kept, layout), dtype)
    u = torch.randn(1001, size, device="cuda").to(dtype)
    expected = x.double() + kept * sharing_compress_adjoint(u.double(), layout)
    triton_groups.add_to_groups(x, u, grouping, True, fresh=False, mask=mask)
    near(x, expected, dtype)


def test_a_machine_where_triton_does_not_work_is_told_so(monkeypatch):
    monkeypatch.setattr(triton_groups, "works", lambda device: 1 / 0)
    kernels._triton_groups.cache_clear()
    with pytest.warns(UserWarning, match="without Triton.*division by zero"):
        assert kernels._triton_groups(torch.device("cuda")) is None
    kernels._triton_groups.cache_clear()
