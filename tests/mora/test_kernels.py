"""The written-out training step against the equations as dense matrices, and which layers take which way."""

import io
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import dense
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GPT2, LLAMA, MLP_KIND
from peft import get_peft_model
from torch import nn
from torch.nn.functional import linear
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mora import Layout, MoraConfig, MoraLayer, get_operator, kernels, layer, register_operator
from mora.dropout import Mask
from mora.kernels import add_update, with_base

DEVICES = ["cpu", "meta", "cuda", "mps", "xpu"]
OPERATORS = ["sharing", "decoupling", "rotation"]
GROUPINGS = ["strided", "blocked"]
WAYS = {
    "added": lambda x, w, b, m, op, layout, mask=None: add_update(linear(x, w, b), x, m, op, layout, False, mask),
    "added in place": lambda x, w, b, m, op, layout, mask=None: add_update(
        linear(x, w, b), x, m, op, layout, True, mask
    ),
    "with the base": lambda x, w, b, m, op, layout, mask=None: with_base(x, w, b, m, op, layout, False, mask),
    "folded": lambda x, w, b, m, op, layout: with_base(x, w, b, m, op, layout, True),
}
every_way = pytest.mark.parametrize("way", WAYS)
every_way_but_folded = pytest.mark.parametrize("way", [way for way in WAYS if way != "folded"])
every_operator = pytest.mark.parametrize("name", OPERATORS)


@st.composite
def cases(draw, largest=30, batches=((), (3,), (0,), (2, 3), (2, 1, 4), (150,), (1300,))):
    """(operator, layout, x, W, b or None, M), in double precision; r_hat divides the sides or not, as it comes."""
    name = draw(st.sampled_from(OPERATORS))
    k, d = draw(st.integers(2, largest)), draw(st.integers(2, largest))
    size = draw(st.integers(1, min(k, d)))
    if name == "rotation":
        size = max(2, size - size % 2)
    layout = Layout(k, d, size, draw(st.sampled_from(GROUPINGS)), draw(st.sampled_from(GROUPINGS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    bias = random(d) if draw(st.booleans()) else None
    return name, layout, random(*draw(st.sampled_from(batches)), k), random(d, k), bias, random(size, size)


def dropped(x, mask):
    return x if mask is None else x * mask.of(x.shape, x) * mask.scale


@pytest.mark.parametrize(
    ("way", "p"), [*((way, 0.0) for way in WAYS), *((way, 0.4) for way in WAYS if way != "folded")]
)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(cases())
def test_value_and_gradients_are_those_of_the_equation(way, p, case):
    name, layout, x, weight, bias, m = case
    with_mask = (Mask(x.numel(), p),) if p else ()
    x.requires_grad_()
    m.requires_grad_()
    units = torch.eye(layout.size**2, dtype=m.dtype).unflatten(1, m.shape)
    groupings = (layout.in_grouping, layout.out_grouping)
    sides = layout.in_features, layout.out_features
    basis = torch.stack([dense.delta_weight(name, unit, *sides, groupings) for unit in units])
    delta = torch.einsum("e,edk->dk", m.flatten(), basis)
    expected = linear(x, weight, bias) + linear(dropped(x, *with_mask) if p else x, delta)
    result = WAYS[way](x, weight, bias, m, get_operator(name), layout, *with_mask)
    gradient = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, (x, m), gradient)
    # Rotation's angles are computed in single precision, as the authors' code does.
    precision = 1e-5 if name == "rotation" else 1e-12
    for mine, other in zip((result, *torch.autograd.grad(result, (x, m), gradient)), (expected, *theirs), strict=True):
        size = max(1.0, other.abs().max().item()) if other.numel() else 1.0
        torch.testing.assert_close(mine, other, rtol=precision, atol=precision * size)


@every_way
@every_operator
def test_inputs_and_gradients_need_not_lie_in_one_piece(way, name):
    layout, operator = Layout(20, 14, 6), get_operator(name)
    x, m = torch.randn(20, 5, 3, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    weight = torch.randn(14, 20, dtype=torch.float64)

    def computed(x):
        x, m_ = x.requires_grad_(), m.clone().requires_grad_()
        result = WAYS[way](x, weight, None, m_, operator, layout)
        return torch.autograd.grad(result, (x, m_), torch.ones((), dtype=torch.float64).expand(result.shape))

    for mine, other in zip(computed(x.permute(2, 1, 0)), computed(x.permute(2, 1, 0).contiguous()), strict=True):
        torch.testing.assert_close(mine, other)


@every_way
@settings(deadline=None, derandomize=True, max_examples=10)
@given(cases(largest=8, batches=((3,), (2, 2))))
def test_gradcheck(way, case):
    name, layout, x, weight, bias, m = case

    def function(x, m):
        return WAYS[way](x, weight, bias, m, get_operator(name), layout)

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), m.requires_grad_()))


@every_way
@every_operator
def test_only_the_gradients_that_are_asked_for(way, name):
    layout, x, m = Layout(12, 10, 4), torch.randn(5, 12), torch.randn(4, 4)
    for x_needed, m_needed in ((True, False), (False, True), (False, False)):
        x.requires_grad_(x_needed)
        m.requires_grad_(m_needed)
        x.grad = m.grad = None
        result = WAYS[way](x, torch.randn(10, 12), None, m, get_operator(name), layout)
        assert result.requires_grad == (x_needed or m_needed)
        if result.requires_grad:
            result.sum().backward()
        assert (x.grad is not None, m.grad is not None) == (x_needed, m_needed)


@every_way
def test_a_second_derivative_is_refused_in_words(way):
    layout, x, m = Layout(12, 10, 4), torch.randn(5, 12, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    result = WAYS[way](x, torch.randn(10, 12), None, m, get_operator("rotation"), layout)
    (first,) = torch.autograd.grad(result.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@every_way_but_folded
@every_operator
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("k", "d", "size"), [(64, 64, 16), (64, 176, 20), (176, 64, 20), (50, 50, 48)])
def test_bf16_is_about_as_near_to_the_truth_as_the_dense_form(way, name, k, d, size, p):
    layout, operator = Layout(k, d, size), get_operator(name)
    mask = Mask(9, p) if p else None
    x, gradient = torch.randn(700, k).bfloat16(), torch.randn(700, d).bfloat16()
    weight, m = (torch.randn(d, k) / k**0.5).bfloat16(), (torch.randn(size, size) / (3 * k**0.5)).bfloat16()

    def computed(function, dtype):
        x_, m_ = x.to(dtype).requires_grad_(), m.to(dtype).requires_grad_()
        result = function(x_, weight.to(dtype), m_)
        return result, *torch.autograd.grad(result, (x_, m_), gradient.to(dtype))

    def dense_form(x, weight, m):
        return linear(x, weight) + linear(dropped(x, mask), operator.dense(m, layout))

    truth = computed(dense_form, torch.float64)
    theirs = computed(dense_form, torch.bfloat16)
    ours = computed(lambda x, w, m: WAYS[way](x, w, None, m, operator, layout, mask), torch.bfloat16)
    # Value, gradient of x, gradient of M. Some sums and the parts that wrap around are rounded twice.
    for mine, other, true, bound in zip(ours, theirs, truth, (1.1, 1.25, 1.5), strict=True):
        assert (mine - true).norm() <= bound * (other - true).norm()


@every_operator
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_is_kept_for_the_backward_pass_is_small_or_shared(name, p):
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    base = nn.Linear(64, 48, bias=False).requires_grad_(False)
    module = get_peft_model(nn.Sequential(base), MoraConfig(r=2, operator=name, dropout=p, target_modules=["0"]))
    x = torch.randn(100, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = module(x)
    for parameter in module.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    if name == "sharing":
        size = get_operator(name).size(64, 48, 2)
        assert list(saved.values()) == [100 * size * 4]
    else:
        assert list(saved) == [x.untyped_storage().data_ptr()]
    assert kept.shape == (100, 48)


# ---------------------------------------------------------------------------------------------------
# Which way a layer takes


def adapted(name="rotation", dropout=0.0, dtype=torch.float32, **kwargs):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 36)).to(dtype)
    config = MoraConfig(r=2, operator=name, dropout=dropout, init_weights=False, target_modules=["0"])
    return get_peft_model(model, config, **kwargs).train()


@pytest.fixture
def ways(monkeypatch):
    """The names of the ways taken, in order."""
    taken = []

    def spy(name):
        function = getattr(kernels, name)

        def called(*arguments):
            fold = name == "with_base" and arguments[6]
            taken.append("folded" if fold else name)
            return function(*arguments)

        monkeypatch.setattr(layer, name, called)

    spy("add_update")
    spy("with_base")
    return taken


def mora_layer(model) -> MoraLayer:
    return next(module for module in model.modules() if isinstance(module, MoraLayer))


def by_the_pair(model, x):
    module = mora_layer(model)
    return module.base_layer(x) + module.mora_update(x, "default")


@every_operator
def test_a_plain_base_without_dropout_is_computed_with_the_update(name, ways):
    model, x = adapted(name), torch.randn(2, 20, 24)
    torch.testing.assert_close(model(x), by_the_pair(model, x), rtol=1e-5, atol=1e-5)
    assert ways == ["with_base"]
    x = torch.randn(2000, 24)
    torch.testing.assert_close(model(x), by_the_pair(model, x), rtol=1e-5, atol=1e-5)
    assert ways == ["with_base", "folded"]


def test_what_is_not_folded_or_not_joined(ways):
    x = torch.randn(2000, 24)
    adapted(dtype=torch.bfloat16, autocast_adapter_dtype=False)(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapted()(x)
    dropout = adapted(dropout=0.5)
    dropout(x)
    dropout.eval()(x)
    trained = adapted()
    mora_layer(trained).base_layer.weight.requires_grad_(True)
    trained(x).sum().backward()
    assert mora_layer(trained).base_layer.weight.grad is not None
    two = adapted()
    two.add_adapter("other", MoraConfig(r=3, target_modules=["0"]))
    two.base_model.set_adapter(["default", "other"])
    two(x)
    assert ways == ["with_base", "add_update", "with_base", "folded", "add_update", "add_update", "add_update"]


def test_few_tokens_and_mixed_dtypes_take_the_pair(ways):
    adapted()(torch.randn(9, 24))  # M has 10 rows
    adapted("sharing")(torch.randn(2, 24))
    adapted(dtype=torch.bfloat16, autocast_adapter_dtype=False)(torch.randn(14, 24).bfloat16())
    mixed = adapted(dtype=torch.bfloat16)  # M is fp32
    x = torch.randn(40, 24).bfloat16()
    torch.testing.assert_close(mixed(x), by_the_pair(mixed, x).bfloat16())
    assert ways == []
    adapted()(torch.randn(10, 24))
    adapted("sharing")(torch.randn(3, 24))
    assert ways == ["with_base"] * 2


def test_an_operator_of_ones_own_under_a_known_name_takes_its_own_functions(ways):
    known = get_operator("sharing")
    try:
        register_operator(type(known)("sharing", known.compress, known.decompress), overwrite=True)
        model, x = adapted("sharing"), torch.randn(40, 24)
        torch.testing.assert_close(model(x), by_the_pair(model, x))
    finally:
        register_operator(known, overwrite=True)
    assert ways == []


def test_a_hook_on_the_base_sees_and_keeps_the_bases_own_output(ways):
    model, x, seen = adapted(), torch.randn(40, 24), []
    base = mora_layer(model).base_layer
    base.register_forward_hook(lambda module, args, output: seen.append(output))
    result = model(x)
    torch.testing.assert_close(seen[0], linear(x, base.weight, base.bias))
    torch.testing.assert_close(result, by_the_pair(model, x))
    assert ways == ["add_update"]


@every_operator
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dropout_acts_on_the_updates_input_alone(name, dropout, ways):
    model, x = adapted(name, dropout), torch.randn(40, 24, requires_grad=True)
    module, gradient = mora_layer(model), torch.randn(40, 36)
    torch.manual_seed(5)
    ours = torch.autograd.grad(model(x), [x, module.mora_M["default"]], gradient)
    torch.manual_seed(5)
    mask = Mask.drawn(dropout) if dropout else None
    module.mora_dropout.eval()
    expected = module.base_layer(x) + module.mora_update(dropped(x, mask), "default")
    for mine, other in zip(ours, torch.autograd.grad(expected, [x, module.mora_M["default"]], gradient), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert ways == ["with_base"]


@every_operator
@pytest.mark.parametrize(("triton", "graph"), [(False, False), (True, False), (True, True)])
def test_on_a_gpu_without_triton_or_in_a_cuda_graph_dropout_is_pytorchs(monkeypatch, name, triton, graph):
    kernel = SimpleNamespace(drops=lambda device: True)
    monkeypatch.setattr(kernels, "_triton_kernels", lambda device: {name: kernel} if triton else {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: graph)

    def taken(device):
        x = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
        return layer._has_mask(nn.Dropout(0.1), get_operator(name), x)

    taken_on = {device: taken(device) for device in DEVICES}
    assert taken_on == {"cpu": True, "meta": True, "cuda": triton and not graph, "mps": False, "xpu": False}


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_dropout_set_to_none_or_all_draws_nothing(p, ways):
    model, x = adapted(dropout=0.5), torch.randn(40, 24)
    mora_layer(model).mora_dropout["default"].p = p
    expected = by_the_pair(model.eval(), x) if p == 0 else mora_layer(model).base_layer(x)
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-5, atol=1e-5)
    assert ways == ["add_update"]


def test_a_hook_on_the_dropout_sees_what_it_drops(ways):
    model, x, seen = adapted(dropout=0.5), torch.randn(40, 24), []
    mora_layer(model).mora_dropout["default"].register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    assert ways == ["add_update"] and 0.3 < (seen[0] == 0).float().mean() < 0.7


@every_operator
def test_autocast_gives_the_gradients_of_the_pair_in_bf16(name, ways):
    model, x = adapted(name), torch.randn(40, 24)
    m = mora_layer(model).mora_M["default"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(x), by_the_pair(model, x)
    assert ours.dtype == torch.bfloat16 and ways == ["add_update"]
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    gradient = torch.randn_like(ours)
    (mine,), (other,) = (torch.autograd.grad(y, m, gradient) for y in (ours, theirs))
    assert mine.dtype == torch.float32 and (mine - other).norm() < 1e-2 * other.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same(reentrant, dropout, ways):
    def gradient(checkpointing: bool) -> torch.Tensor:
        torch.manual_seed(0)
        config = MoraConfig(r=3, init_weights=False, dropout=dropout, **LLAMA.config)
        model = get_peft_model(LLAMA.model(), config).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        model(**LLAMA.batch()).logits.pow(2).mean().backward()
        return mora_layer(model).mora_M["default"].grad

    torch.testing.assert_close(gradient(True), gradient(False))
    assert set(ways) == {"with_base"}


def test_checkpointing_that_keeps_products_takes_the_pair(ways):
    """It keeps the base's output, to which the update would be added."""
    model, x = adapted(), torch.randn(40, 24, requires_grad=True)
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
    result = checkpoint(lambda x: model(x).tanh(), x, use_reentrant=False, context_fn=kept)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert ways == []
    torch.testing.assert_close(gradient, torch.autograd.grad(model(x).tanh().sum(), x)[0], rtol=1e-4, atol=1e-5)


class SumsInSingle(TorchFunctionMode):
    """CUDA's autocast gives a sum of half precision values in single; a CPU's does not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        half = args and isinstance(args[0], torch.Tensor) and args[0].dtype in (torch.bfloat16, torch.float16)
        if half and function in (torch.sum, torch.Tensor.sum) and torch.is_autocast_enabled("cpu"):
            kwargs.setdefault("dtype", torch.float32)
        return function(*args, **kwargs)


@every_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sums_of_cudas_autocast_do_no_harm(name, dtype, ways):
    model = get_peft_model(
        nn.Sequential(nn.Linear(200, 200)), MoraConfig(r=1, operator=name, init_weights=False, target_modules=["0"])
    )
    x = torch.randn(80, 200, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype), SumsInSingle():
        result = model(x)
        result.float().sum().backward()
    assert ways == ["add_update"] and torch.isfinite(x.grad).all()


@pytest.mark.gpu
@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_under_autocast_and_without_it_is_as_the_pair(name, dtype, ways):
    model, x = adapted(name).cuda(), torch.randn(2, 1000, 24, device="cuda")
    m = mora_layer(model).mora_M["default"]
    gradient = torch.randn(2, 1000, 36, device="cuda")

    def computed(function):
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            result = function(x)
        return result.float(), torch.autograd.grad(result, m, gradient.to(result.dtype))[0]

    ours, theirs = computed(model), computed(lambda x: by_the_pair(model, x))
    assert len(ways) == 1
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < bound * other.norm()


@every_operator
@pytest.mark.parametrize("tokens", [20, 2000])
def test_autocast_around_the_backward_pass_alone_does_no_harm(name, tokens):
    model, x = adapted(name), torch.randn(tokens, 24, requires_grad=True)
    (plain,) = torch.autograd.grad(model(x).sum(), x)
    result = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (around,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(around, plain)


def test_doubles_stay_doubles_under_autocast(ways):
    model = adapted(dtype=torch.float64, autocast_adapter_dtype=False)
    x = torch.randn(40, 24, dtype=torch.float64)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x), expected)


def test_nothing_is_folded_where_products_have_fewer_digits(ways):
    x = torch.randn(2000, 24)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        adapted()(x)
        adapted(dtype=torch.float64, autocast_adapter_dtype=False)(x.double())
    finally:
        torch.set_float32_matmul_precision(before)
    assert ways == ["with_base", "folded"]


def test_a_hook_on_all_modules_sees_and_keeps_the_bases_own_output(ways):
    model, x, seen = adapted(), torch.randn(40, 24), []
    base = mora_layer(model).base_layer
    hook = register_module_forward_hook(lambda module, args, output: seen.append(output) if module is base else None)
    try:
        model(x)
    finally:
        hook.remove()
    torch.testing.assert_close(seen, [linear(x, base.weight, base.bias)])
    assert ways == ["add_update"]


@every_operator
def test_of_a_frozen_m_nothing_is_kept_for_its_gradient(name):
    model = adapted(name, dropout=0.5)
    m_RR = mora_layer(model).mora_M["default"].requires_grad_(False)
    kept, x = [], torch.randn(40, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(x)
    assert {tuple(tensor.shape) for tensor in kept} <= {tuple(m_RR.shape), (36, 24)}


@dataclass
class Halves:
    """A function that can't be hashed."""

    factor: float

    def __call__(self, x, layout):
        return self.factor * x[..., : layout.size]


def test_an_operators_functions_need_no_hash(ways):
    known = get_operator("truncation")
    register_operator(type(known)("halves", Halves(0.5), known.decompress), overwrite=True)
    model, x = adapted("halves"), torch.randn(40, 24)
    torch.testing.assert_close(model(x), by_the_pair(model, x))
    assert ways == []


@every_operator
def test_a_traced_layer_can_be_saved_and_computes_the_same(name):
    model, x = adapted(name).eval(), torch.randn(40, 24)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(mora_layer(model), x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


def test_torch_func_differentiates_the_pair(ways):
    model, x = adapted(), torch.randn(40, 24)
    name, m = next((name, value) for name, value in model.named_parameters() if "mora_M" in name)
    m = m.detach()

    def loss(m):
        return torch.func.functional_call(model, {name: m}, (x,)).pow(2).sum()

    by_func = torch.func.grad(loss)(m)
    assert ways == []
    model(x).pow(2).sum().backward()
    torch.testing.assert_close(by_func, mora_layer(model).mora_M["default"].grad, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize("kind", [MLP_KIND, GPT2], ids=lambda kind: kind.name)  # Linear and Conv1D
@pytest.mark.parametrize("name", [*OPERATORS, "truncation"])
def test_merging_in_place_adds_the_dense_form_to_the_bit(name, kind):
    model = get_peft_model(kind.model(), MoraConfig(r=3, operator=name, init_weights=False, **kind.config))
    module = mora_layer(model)
    expected = module.base_layer.weight + module.get_delta_weight("default")
    model.merge_adapter()
    assert torch.equal(module.base_layer.weight, expected)
