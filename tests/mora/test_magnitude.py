"""MoRA with DoRA's magnitude: W' = m (W + delta) / |W + delta| by output."""

import pytest
import torch
from models import KINDS, LLAMA, MLP_KIND, Kind, logits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear

from mora import MoraConfig, MoraLayer

OPERATORS = ["truncation", "sharing", "decoupling", "rotation"]

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")


def adapted(kind: Kind, **config) -> PeftModel:
    """A model whose M and magnitudes are away from their start."""
    torch.manual_seed(3)
    arguments = {"r": 3, "init_weights": False, "use_dora": True, **kind.config, **config}
    model = get_peft_model(kind.model(), MoraConfig(**arguments)).eval()
    with torch.no_grad():
        for layer in layers(model):
            magnitude_D = layer.mora_magnitude["default"]
            magnitude_D.mul_(torch.rand_like(magnitude_D) + 0.5)
    return model


def layers(model: nn.Module) -> list[MoraLayer]:
    return [module for module in model.modules() if isinstance(module, MoraLayer)]


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def linear_with_magnitude(operator: str, bias: bool, width: int = 24) -> tuple[nn.Module, MoraLayer]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(30, width, bias=bias)).double()
    config = MoraConfig(r=4, operator=operator, use_dora=True, init_weights=False, target_modules=["0"])
    model = get_peft_model(model, config)
    layer = layers(model)[0]
    with torch.no_grad():
        layer.mora_magnitude["default"].uniform_(0.5, 2)
    return model, layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operator", OPERATORS)
def test_outputs_and_gradients_are_those_of_the_dense_form(operator, bias):
    model, layer = linear_with_magnitude(operator, bias)
    m_RR, magnitude_D = layer.mora_M["default"], layer.mora_magnitude["default"]
    x = torch.randn(50, 30, dtype=torch.float64, requires_grad=True)
    base = layer.get_base_layer()

    def dense() -> Tensor:
        # The matrix from the operator's own response to unit vectors, so that it is differentiable in M.
        delta = layer.mora_update(torch.eye(30, dtype=torch.float64), "default").T
        total = base.weight + delta
        return linear(x, magnitude_D[:, None] * total / total.norm(dim=1, keepdim=True).detach(), base.bias)

    gradient = torch.randn(50, base.out_features, dtype=torch.float64)
    ours, theirs = model(x), dense()
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, [x, m_RR, magnitude_D], gradient),
        torch.autograd.grad(theirs, [x, m_RR, magnitude_D], gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_it_is_pefts_dora_where_the_updates_are_equal():
    """PEFT's DoRA on a LoRA of full rank, A = 1 and B = MoRA's update."""
    model, layer = linear_with_magnitude("rotation", bias=True)
    torch.manual_seed(5)
    peers = nn.Sequential(nn.Linear(30, 24)).double()
    peer = get_peft_model(peers, LoraConfig(r=30, lora_alpha=30, use_dora=True, target_modules=["0"]))
    theirs = peer.base_model.model[0]
    with torch.no_grad():
        update = layer.get_base_layer().weight.new_zeros(24, 30)
        update += layer.mora_update(torch.eye(30, dtype=torch.float64), "default").T
        theirs.lora_A["default"].weight.copy_(torch.eye(30))
        theirs.lora_B["default"].weight.copy_(update)
        theirs.lora_magnitude_vector["default"].weight.copy_(layer.mora_magnitude["default"])
    x = torch.randn(7, 30, dtype=torch.float64)
    torch.testing.assert_close(model(x), peer(x))
    model.merge_adapter()
    peer.merge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight, theirs.get_base_layer().weight)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_starts_as_the_base_and_trains_m_and_one_value_for_each_output(kind):
    model = get_peft_model(kind.model(), MoraConfig(r=3, use_dora=True, **kind.config)).eval()
    assert_close(logits(model, kind.batch()), logits(kind.model(), kind.batch()))
    for layer in layers(model):
        assert layer.mora_magnitude["default"].shape == (layer.out_features,)
        assert layer.mora_magnitude["default"].requires_grad and layer.mora_M["default"].requires_grad


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_merging_keeps_the_function_and_unmerging_restores_the_weights(kind, safe):
    model = adapted(kind)
    before = logits(model, kind.batch())
    weights = [layer.get_base_layer().weight.clone() for layer in layers(model)]
    deltas = [layer.get_delta_weight("default") for layer in layers(model)]
    model.merge_adapter(safe_merge=safe)
    assert_close(logits(model, kind.batch()), before)
    for weight, delta, layer in zip(weights, deltas, layers(model), strict=True):
        assert_close(layer.get_base_layer().weight, weight + delta)
        assert_close(layer.get_delta_weight("default"), delta)
    model.unmerge_adapter()
    assert_close(logits(model, kind.batch()), before)
    for weight, layer in zip(weights, layers(model), strict=True):
        assert_close(layer.get_base_layer().weight, weight)
    merged = model.merge_and_unload()
    assert not layers(merged)
    assert_close(logits(merged, kind.batch()), before)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = adapted(LLAMA)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path, low_cpu_mem_usage=low).eval()
        assert torch.equal(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))


def test_a_base_in_bf16_trains_and_merges():
    model = get_peft_model(MLP_KIND.model().to(torch.bfloat16), MoraConfig(r=3, use_dora=True, **MLP_KIND.config))
    batch = {name: each.to(torch.bfloat16) for name, each in MLP_KIND.batch().items()}
    logits(model, batch)
    model(**batch).float().sum().backward()
    for layer in layers(model):
        assert layer.mora_magnitude["default"].dtype == torch.float32
        assert torch.count_nonzero(layer.mora_magnitude["default"].grad)
    model.merge_adapter()
    assert layers(model)[0].get_base_layer().weight.dtype == torch.bfloat16


def test_what_it_can_not_do_is_said():
    model = adapted(LLAMA)
    model.add_adapter("second", MoraConfig(r=3, init_weights=False, **LLAMA.config))
    with pytest.raises(ValueError, match="can't be combined"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="can't work on some samples"):
        rows = len(next(iter(LLAMA.batch().values())))
        model(**LLAMA.batch(), adapter_names=["default"] * rows)
    with pytest.raises(ValueError, match="can't work at the same time"):
        model.merge_adapter(["default", "second"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="Make one of them active alone"):
        logits(model, LLAMA.batch())
    model.base_model.set_adapter("second")
    logits(model, LLAMA.batch())


def test_a_refused_merge_changes_no_layer():
    model = get_peft_model(
        nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)), MoraConfig(r=2, target_modules=["0"], init_weights=False)
    )
    model.add_adapter("scaled", MoraConfig(r=2, target_modules=["1"], use_dora=True, init_weights=False))
    x = torch.randn(5, 20)
    model.base_model.set_adapter(["default", "scaled"])
    before = model(x)
    model.merge_adapter()  # each has a layer of its own
    assert_close(model(x), before)
    model.unmerge_adapter()
    model.add_adapter("both", MoraConfig(r=2, target_modules=["0", "1"], init_weights=False))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="can't work at the same time"):
            merge(adapter_names=["both", "scaled"])
        assert not any(layer.merged_adapters for layer in layers(model))


def test_a_merged_model_can_be_moved_and_unmerged():
    model = adapted(MLP_KIND)
    model.merge_adapter()
    model.to("meta")
    model.unmerge_adapter()
    assert not any(layer.merged_adapters or layer._lengths_before_merge for layer in layers(model))


def test_an_adapter_made_anew_without_it_has_no_magnitude():
    model = adapted(MLP_KIND)
    for layer in layers(model):
        layer.update_layer("default", 3, MoraConfig(r=3, **MLP_KIND.config))
    assert not any("magnitude" in name for name in model.state_dict())
    assert torch.equal(logits(model, MLP_KIND.batch()), logits(MLP_KIND.model(), MLP_KIND.batch()))
