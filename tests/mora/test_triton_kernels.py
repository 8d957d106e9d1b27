"""The Triton kernels, on a GPU or else in Triton's interpreter, against the functions of operators.py."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import GROUPINGS, WAYS, dropped, every_operator, every_way_but_folded
from torch.nn.functional import linear

from mora import Layout, get_operator, kernels
from mora.dropout import Mask
from mora.operators import (
    rotation_matrices,
    rotation_matrices_adjoint,
    sharing_compress,
    sharing_compress_adjoint,
    sharing_decompress,
    sharing_decompress_adjoint,
)

pytest.importorskip("triton", reason="Triton isn't installed: pip install -e '.[triton]'")

from mora import triton_kernels
from mora.triton_kernels import Groups, TritonSharing, add_to_groups, sum_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value. A GPU rounds to bf16, and the interpreter cuts.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3, torch.float16: 5e-4}
TOKENS = (1, 3, 40)
EXAMPLES = 3 if DEVICE == "cuda" else 25  # a GPU's kernels are compiled for each layout


@st.composite
def layouts(draw, largest=80, name="sharing"):
    k, d = draw(st.integers(2, largest)), draw(st.integers(2, largest))
    size = draw(st.integers(1, min(k, d)))
    if name == "rotation":
        size = max(2, size - size % 2)
    return Layout(k, d, size, draw(st.sampled_from(GROUPINGS)), draw(st.sampled_from(GROUPINGS)))


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def near(mine, other, dtype):
    assert mine.dtype == dtype and mine.shape == other.shape
    assert (mine.double() - other).abs().max() <= BOUNDS[dtype] * max(1.0, other.abs().max().item())


def near_with_zeros_behind(mine, other, dtype):
    mine, size = mine.squeeze(1), other.shape[1]
    assert mine.shape[1] % (16 // mine.element_size()) == 0 and not mine[:, size:].any()
    near(mine[:, :size], other, dtype)


def check_sharing(layout, tokens, dtype, mask):
    ins, outs = triton_kernels._inputs(layout), triton_kernels._outputs(layout)
    x, g, y = (random(tokens, n, dtype=dtype) for n in (layout.in_features, layout.out_features, layout.out_features))
    kept = 1 if mask is None else mask.of(x.shape, x).double() * mask.scale
    near_with_zeros_behind(sum_groups(x, ins, mask), sharing_compress(x.double() * kept, layout), dtype)
    near_with_zeros_behind(sum_groups(g, outs), sharing_decompress_adjoint(g.double(), layout), dtype)
    u = sum_groups(g, outs)  # with zeros behind, as they come
    values = u[:, 0, : layout.size].double()
    expected = y.double() + sharing_decompress(values, layout)
    add_to_groups(y, u, outs)
    near(y, expected, dtype)
    spread = kept * sharing_compress_adjoint(values, layout)
    expected = x.double() + spread
    add_to_groups(x, u, ins, mask)
    near(x, expected, dtype)
    fresh = torch.full_like(x, float("nan"))
    add_to_groups(fresh, u, ins, mask, fresh=True)
    near(fresh, spread, dtype)


def check_rotation(layout, dtype):
    m, m_blocks = (random(*shape, layout.size, layout.size, dtype=dtype) for shape in ((), (layout.blocks,)))
    turned = rotation_matrices(m.float(), layout).double()
    near(triton_kernels.rotation_matrices(m, layout), turned, dtype)
    back = rotation_matrices_adjoint(m_blocks.float(), layout).double()
    near(triton_kernels.rotation_matrices_adjoint(m_blocks, layout), back, dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@settings(deadline=None, derandomize=True, max_examples=EXAMPLES)
@given(layouts(), st.sampled_from(TOKENS), st.integers(0, 2**63 - 1))
def test_sums_and_their_transposes_are_those_of_the_operator(dtype, p, layout, tokens, seed):
    check_sharing(layout, tokens, dtype, Mask(seed, p) if p else None)


@pytest.mark.parametrize("dtype", BOUNDS)
@settings(deadline=None, derandomize=True, max_examples=EXAMPLES)
@given(layouts(name="rotation"))
def test_m_is_turned_as_by_the_operator(dtype, layout):
    check_rotation(layout, dtype)


@pytest.mark.parametrize(("features", "size"), [(300, 260), (1100, 300), (600, 4), (2048, 512)])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_more_groups_than_a_tile_has_and_more_members(features, size, grouping):
    check_sharing(Layout(features, features, size, grouping, grouping), 33, torch.float32, Mask(5, 0.5))
    check_rotation(Layout(features, features, size), torch.float32)


def test_tensors_that_start_anywhere_and_tokens_that_do_not_follow_each_other():
    layout, whole = Layout(24, 24, 10), random(7, 50)
    x, onto, mask = whole[:, 1:25], random(7 * 24 + 1)[1:].view(7, 24), Mask(1, 0.5)
    expected = sharing_compress(dropped(x, mask).double(), layout)
    near_with_zeros_behind(sum_groups(x, Groups(24, 10, wrap=True), mask), expected, torch.float32)
    values = random(7, 24)[:, :12]
    expected = onto.double() + sharing_decompress(values[:, :10].double(), layout)
    add_to_groups(onto, values, Groups(24, 10))
    near(onto, expected, torch.float32)


@contextmanager
def by_triton():
    """kernels.py takes the Triton kernels on a CPU too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "works", lambda device: None)
        own = kernels._triton_kernels.__wrapped__(torch.device("cpu"))
        patch.setattr(kernels, "_KERNELS", {name: (get_operator(name), kernel) for name, kernel in own.items()})
        yield


def check_step(way, name, p, layout, batch, dtype=torch.float32):
    operator, mask = get_operator(name), Mask(7, p) if p else None
    x, m = random(*batch, layout.in_features, dtype=dtype), random(layout.size, layout.size, dtype=dtype)
    weight = random(layout.out_features, layout.in_features, dtype=dtype)
    gradient = random(*batch, layout.out_features, dtype=dtype)

    def computed(function, dtype):
        x_, m_ = x.to(dtype).requires_grad_(), m.to(dtype).requires_grad_()
        result = function(x_, weight.to(dtype), m_)
        return result, *torch.autograd.grad(result, (x_, m_), gradient.to(dtype))

    theirs = computed(lambda x, w, m: linear(x, w) + operator(dropped(x, mask), m, layout), torch.float64)
    with by_triton():
        ours = computed(lambda x, w, m: WAYS[way](x, w, None, m, operator, layout, mask), dtype)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape and mine.dtype == dtype
        assert (mine - other).norm() <= bound * other.norm()


@every_way_but_folded
@every_operator
@pytest.mark.parametrize("p", [0.0, 0.4])
@settings(deadline=None, derandomize=True, max_examples=EXAMPLES)
@given(st.data())
def test_value_and_gradients_are_those_of_the_pair(way, name, p, data):
    layout = data.draw(layouts(name=name, largest=40))
    check_step(way, name, p, layout, data.draw(st.sampled_from([(), (3,), (0,), (2, 1, 4)])))


@every_way_but_folded
@every_operator
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sides", [(16, 16, 8), (20, 20, 8), (8, 40, 8), (40, 16, 8), (12, 12, 12), (30, 17, 10)])
def test_blocks_that_lie_well_or_not(way, name, p, dtype, sides):
    check_step(way, name, p, Layout(*sides), (5,), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("features", "size"), [(4096, 256), (4096, 1448), (11008, 348), (11008, 1390)])
def test_at_the_sizes_of_a_real_layer(dtype, features, size):
    check_rotation(Layout(features, features, size), dtype)
    for grouping in GROUPINGS:
        check_sharing(Layout(features, features, size, grouping, grouping), 1001, dtype, Mask(3, 0.1))


@pytest.mark.gpu
def test_which_kernels_a_gpu_takes():
    x = torch.ones(1, device="cuda")
    assert isinstance(kernels.kernel_of(get_operator("sharing"), x), TritonSharing)
    assert not isinstance(kernels.kernel_of(get_operator("sharing"), x.double()), TritonSharing)


def test_the_kernels_compile_for_a_gpu_and_are_launched_with_what_they_take():
    script = Path(__file__).with_name("compiled_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {
        "_sum_groups",
        "_add_to_groups",
        "_turn",
        "_turn_back",
    }


def test_a_machine_where_triton_does_not_work_is_told_so(monkeypatch):
    monkeypatch.setattr(triton_kernels, "works", lambda device: 1 / 0)
    kernels._triton_kernels.cache_clear()
    with pytest.warns(UserWarning, match="Triton fails there: division by zero"):
        assert kernels._triton_kernels(torch.device("cuda")) == {}
    kernels._triton_kernels.cache_clear()


def test_triton_finds_nothing_left_when_a_command_ends():
    """Triton tells of objects that are left when a process ends, such as those set aside from the collector."""
    program = "from mora_repro import imported; imported('mora_repro.start')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "leaked" not in done.stderr, done.stderr
