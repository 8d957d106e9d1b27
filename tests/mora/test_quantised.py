"""MoRA on bases that bitsandbytes quantised to 8 and 4 bits."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from mora import MoraConfig, MoraLayer

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e '.[dev,quantised]'")

# A merge quantises the sum anew. The largest error that may make, as part of the largest output.
TOLERANCE = {8: 0.05, 4: 0.4}

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
all_bits = pytest.mark.parametrize("bits", [8, 4])
pytestmark = pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*:UserWarning")


def base(bits: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    for name in ("0", "2"):
        linear = plain.get_submodule(name)
        sizes = (linear.in_features, linear.out_features)
        if bits == 8:
            quantised = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            quantised = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
        quantised.load_state_dict(linear.state_dict())
        setattr(plain, name, quantised)
    return plain.to(device).eval()


def adapted(bits: int, device: str) -> PeftModel:
    config = MoraConfig(r=4, init_weights=False, target_modules=["0", "2"])
    return get_peft_model(base(bits, device), config).eval()


def layer(model: PeftModel) -> MoraLayer:
    return model.base_model.model[0]


def batch(device: str) -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).to(device)


@devices
@all_bits
@torch.no_grad()
def test_the_update_is_added_to_what_the_quantised_layer_gives(bits, device):
    model, x = adapted(bits, device), batch(device)
    expected = layer(model).base_layer(x) + x @ layer(model).get_delta_weight("default").T
    torch.testing.assert_close(layer(model)(x), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(x), base(bits, device)(x))


@devices
@all_bits
def test_m_is_trained_and_the_base_is_not(bits, device):
    model, x = adapted(bits, device).train(), batch(device)
    model(x).pow(2).mean().backward()
    assert all(p.grad is not None and torch.count_nonzero(p.grad) for p in model.parameters() if p.requires_grad)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"mora_M"}


@devices
@all_bits
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])  # on a CPU, 4-bit weights change when used
@torch.no_grad()
def test_merging_keeps_the_function_but_for_quantising_anew(bits, device, safe, used):
    model, x = adapted(bits, device), batch(device)
    before = adapted(bits, device)(x)
    effect = (before - base(bits, device)(x)).abs().max()
    if used:
        model(x)
    weight = layer(model).get_base_layer().weight
    model.merge_adapter(safe_merge=safe)
    assert layer(model).get_base_layer().weight.dtype in (weight.dtype, torch.uint8, torch.int8)
    tolerance = TOLERANCE[bits] * before.abs().max()
    assert tolerance < effect  # or the test could not fail
    assert (model(x) - before).abs().max() < tolerance
    model.unmerge_adapter()
    assert (model(x) - before).abs().max() < 1.5 * tolerance


@devices
@all_bits
@torch.no_grad()
def test_saving_and_unloading(bits, device, tmp_path):
    model, x = adapted(bits, device), batch(device)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(bits, device), tmp_path).eval()
    assert torch.equal(loaded(x), adapted(bits, device)(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = loaded.merge_and_unload()
    assert type(plain[0]) is type(base(bits, device)[0])


@devices
@all_bits
def test_a_safe_merge_refuses_what_is_not_finite(bits, device):
    model = adapted(bits, device)
    with torch.no_grad():
        layer(model).mora_M["default"][0, 0] = float("nan")
    before = layer(model).get_base_weight().clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer(model).merge(safe_merge=True)
    assert torch.equal(layer(model).get_base_weight(), before)
