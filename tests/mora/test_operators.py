"""The operators against the paper's equations as dense matrices, over random shapes."""

import itertools
import math

import dense
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mora import Layout, Operator, get_operator, register_operator

OPERATORS = ["truncation", "sharing", "decoupling", "rotation"]
GROUPINGS = list(itertools.product(("strided", "blocked"), repeat=2))

settings.register_profile("mora", deadline=None, derandomize=True, max_examples=80)
settings.load_profile("mora")


@st.composite
def cases(draw, largest=40):
    """(operator, layout, M, x), in double precision; r_hat divides the sides or not, as it comes."""
    name = draw(st.sampled_from(OPERATORS))
    k, d = draw(st.integers(2, largest)), draw(st.integers(2, largest))
    size = draw(st.integers(1, min(k, d)))
    if name == "rotation":
        size = max(2, size - size % 2)
    groupings = draw(st.sampled_from(GROUPINGS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    m = torch.randn(size, size, dtype=torch.float64, generator=generator)
    batch = draw(st.sampled_from([(), (3,), (2, 3)]))
    x = torch.randn(*batch, k, dtype=torch.float64, generator=generator)
    return name, Layout(k, d, size, *groupings), m, x


def expected(name: str, layout: Layout, m: torch.Tensor) -> torch.Tensor:
    groupings = (layout.in_grouping, layout.out_grouping)
    return dense.delta_weight(name, m, layout.in_features, layout.out_features, groupings)


# The angles are computed in single precision, as the authors' code does.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


@given(cases())
def test_forward_is_the_equation(case):
    name, layout, m, x = case
    torch.testing.assert_close(get_operator(name)(x, m, layout), x @ expected(name, layout, m).T, **CLOSE)


@given(cases())
def test_the_delta_weight_is_the_equation(case):
    name, layout, m, _ = case
    delta = get_operator(name).dense(m, layout)
    assert delta.is_contiguous()
    torch.testing.assert_close(delta, expected(name, layout, m), **CLOSE)


@given(cases(largest=14))
def test_gradients_are_those_of_the_dense_form(case):
    name, layout, m, x = case

    def gradients(function):
        m_, x_ = m.clone().requires_grad_(), x.clone().requires_grad_()
        function(x_, m_).sin().sum().backward()
        return m_.grad, x_.grad

    ours = gradients(lambda x_, m_: get_operator(name)(x_, m_, layout))
    dense_form = gradients(lambda x_, m_: x_ @ expected_with_grad(name, layout, m_).T)
    for ours_, theirs in zip(ours, dense_form, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-4)


def expected_with_grad(name: str, layout: Layout, m: torch.Tensor) -> torch.Tensor:
    """The dense form as a linear function of M, so that autograd sees M: the sum over M's entries."""
    size = layout.size
    units = torch.eye(size * size, dtype=m.dtype).reshape(size * size, size, size)
    basis = torch.stack([expected(name, layout, unit) for unit in units])
    return torch.einsum("e,edk->dk", m.reshape(-1), basis)


@pytest.mark.parametrize(("k", "d", "size"), [(16, 24, 8), (17, 23, 7), (40, 12, 12), (12, 40, 12)])
@pytest.mark.parametrize("groupings", GROUPINGS)
def test_the_rank_of_sharings_update_reaches_r_hat(k, d, size, groupings):
    m = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    delta = get_operator("sharing").dense(m, Layout(k, d, size, *groupings))
    assert torch.linalg.matrix_rank(delta) == size


@given(st.sampled_from(OPERATORS), st.integers(2, 5000), st.integers(2, 5000), st.integers(1, 300))
def test_the_size_of_m_has_the_parameters_of_lora(name, k, d, r):
    size = get_operator(name).size(k, d, r)
    exact = math.sqrt((k + d) * r)
    if name == "rotation":
        assert size % 2 == 0 and exact - 1.5 <= size <= exact + 0.5
    else:
        assert abs(size - exact) <= 0.5


@given(st.sampled_from(OPERATORS), st.integers(2, 300), st.integers(2, 300))
def test_the_largest_rank_is_the_largest_that_fits(name, k, d):
    operator = get_operator(name)
    best = operator.largest_rank(k, d)
    largest = operator.largest_size(k, d)
    assert largest <= min(k, d)
    fits = [r for r in range(1, 400) if operator.size(k, d, r) <= largest]
    assert best == max(fits, default=0)


@pytest.mark.parametrize("groupings", GROUPINGS)
def test_sharing_by_hand(groupings):
    layout = Layout(5, 7, 3, *groupings)
    x = torch.tensor([1.0, 10, 100, 1000, 10000])
    compressed = get_operator("sharing").compress(x, layout).tolist()
    # strided: x0 x1 x2 | x3 x4 x0; blocked: x0 x1 | x2 x3 | x4.
    assert compressed == ([1001.0, 10010.0, 101.0] if groupings[0] == "strided" else [11.0, 1100.0, 10000.0])
    y = get_operator("sharing").decompress(torch.tensor([1.0, 2, 3]), layout).tolist()
    assert y == ([1, 2, 3, 1, 2, 3, 1] if groupings[1] == "strided" else [1, 1, 1, 2, 2, 3, 3])


def test_rotation_leaves_the_first_block_and_keeps_lengths():
    layout = Layout(12, 12, 4)
    x = torch.randn(12, generator=torch.Generator().manual_seed(0))
    blocks = get_operator("rotation").compress(x, layout)
    torch.testing.assert_close(blocks[0], x[:4])
    torch.testing.assert_close(blocks.norm(dim=-1), x.reshape(3, 4).norm(dim=-1))
    assert not torch.allclose(blocks[1], x[4:8])


def test_an_input_beyond_the_outputs_is_not_read_by_block_operators():
    layout = Layout(40, 10, 8)
    x = torch.randn(40, requires_grad=True)
    get_operator("rotation")(x, torch.eye(8), layout).sum().backward()
    assert torch.count_nonzero(x.grad[16:]) == 0 and torch.count_nonzero(x.grad[:8]) == 8


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_x_and_m_is_kept(name, dtype):
    layout = Layout(10, 14, 6)
    m = torch.ones(6, 6, dtype=dtype)
    assert get_operator(name)(torch.ones(2, 10, dtype=dtype), m, layout).dtype == dtype
    assert get_operator(name).dense(m, layout).dtype == dtype


def test_an_operator_of_ones_own_gets_its_dense_form_for_free():
    mean = Operator(
        "test_mean",
        compress=lambda x, layout: x.mean(dim=-1, keepdim=True).expand(*x.shape[:-1], layout.size),
        decompress=lambda y, layout: y.sum(dim=-1, keepdim=True).expand(*y.shape[:-1], layout.out_features),
    )
    register_operator(mean, overwrite=True)
    layout, m, x = Layout(6, 5, 3), torch.randn(3, 3), torch.randn(4, 6)
    torch.testing.assert_close(get_operator("test_mean")(x, m, layout), x @ mean.dense(m, layout).T)
    with pytest.raises(ValueError, match="already"):
        register_operator(mean)
    with pytest.raises(ValueError, match="identifier"):
        register_operator(Operator("no name", mean.compress, mean.decompress))


def test_an_unknown_operator_is_named_with_those_known():
    with pytest.raises(ValueError, match=r"'rotate'. Did you mean 'rotation'.*decoupling, rotation, sharing"):
        get_operator("rotate")
