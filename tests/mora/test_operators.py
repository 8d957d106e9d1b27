"""The operators against the paper's equations as dense matrices, over random shapes."""

import itertools
import math

import dense
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mora import Layout, Operator, get_operator, register_operator

OPERATORS = ["truncation", "sharing", "decoupling", "rotation"]
GROUPINGS = list(itertools.product(("strided", "blocked"), repeat=2))

quick = settings(deadline=None, derandomize=True, max_examples=80)


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


@quick
@given(cases())
def test_forward_is_the_equation(case):
    name, layout, m, x = case
    torch.testing.assert_close(get_operator(name)(x, m, layout), x @ expected(name, layout, m).T, **CLOSE)


@quick
@given(cases())
def test_the_delta_weight_is_the_equation(case):
    name, layout, m, _ = case
    delta = get_operator(name).dense(m, layout)
    assert delta.is_contiguous()
    torch.testing.assert_close(delta, expected(name, layout, m), **CLOSE)


@quick
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


@quick
@given(st.sampled_from(OPERATORS), st.integers(2, 5000), st.integers(2, 5000), st.integers(1, 300))
def test_the_size_of_m_has_the_parameters_of_lora(name, k, d, r):
    size = get_operator(name).size(k, d, r)
    exact = math.sqrt((k + d) * r)
    if name == "rotation":
        assert size % 2 == 0 and exact - 1.5 <= size <= exact + 0.5
    else:
        assert abs(size - exact) <= 0.5


@quick
@given(st.sampled_from(OPERATORS), st.integers(1, 300), st.integers(1, 300))
@example("rotation", 1, 1)
def test_the_largest_rank_is_the_largest_that_fits(name, k, d):
    operator = get_operator(name)
    step = 2 if name == "rotation" else 1

    def rows(r):
        return int(math.sqrt((k + d) * r) + 0.5) // step * step

    fits = [r for r in range(1, 400) if step <= rows(r) <= min(k, d)]
    assert operator.largest_rank(k, d) == max(fits, default=0)
    assert operator.largest_size(k, d) == min(k, d) // step * step


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
    with pytest.raises(ValueError, match=r"'rotate'. Did you mean 'rotation'.*decoupling,.*rotation, sharing"):
        get_operator("rotate")


@quick
@given(cases(), st.integers(1, 20))
def test_sums_and_multiples_of_inputs_come_out_as_sums_and_multiples(case, factor):
    name, layout, m, x = case
    operator = get_operator(name)
    together = operator(factor * x + x.flip(-1), m, layout)
    torch.testing.assert_close(together, factor * operator(x, m, layout) + operator(x.flip(-1), m, layout))


@pytest.mark.parametrize("size", [0, 9, -1])
def test_a_layout_that_no_matrix_fits_is_refused(size):
    with pytest.raises(ValueError, match=f"between 1 and 8 for a layer of 12 inputs and 8 outputs, got {size}"):
        Layout(12, 8, size)


def test_a_layout_of_an_unknown_grouping_is_refused():
    with pytest.raises(ValueError, match="`out_grouping` should be 'strided' or 'blocked', got 'bloked'"):
        Layout(12, 8, 4, "strided", "bloked")


def test_rotation_refuses_an_odd_size():
    with pytest.raises(ValueError, match="even size, got 3"):
        get_operator("rotation")(torch.ones(6), torch.ones(3, 3), Layout(6, 6, 3))


def test_the_kept_angles_follow_dtype_and_serve_training_after_inference():
    layout, m, x = Layout(26, 39, 14), torch.randn(14, 14), torch.randn(26)  # sizes of this test alone
    with torch.inference_mode():
        first = get_operator("rotation")(x, m, layout)
        assert get_operator("rotation")(x.bfloat16(), m.bfloat16(), layout).dtype == torch.bfloat16
    m.requires_grad_()
    x.requires_grad_()  # only then does the backward pass need the angles
    again = get_operator("rotation")(x, m, layout)
    again.sum().backward()
    assert torch.allclose(first, again) and torch.count_nonzero(m.grad) and torch.count_nonzero(x.grad)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("rotation", "takes a mora.Operator, got a str"),
        (Operator("test_broken", None, torch.relu), "`compress` of operator 'test_broken' should be a function"),
        (Operator("test_broken", torch.relu, torch.relu, 3), "`delta_weight` of operator"),
    ],
)
def test_only_operators_are_registered(wrong, said):
    with pytest.raises(TypeError, match=said):
        register_operator(wrong)
    with pytest.raises(ValueError, match="Unknown MoRA operator"):
        get_operator("test_broken")
