"""DeepSpeed ZeRO 3: training, merging and unmerging where all weights are partitioned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import alone

from mora_repro.training import build_extensions

pytest.importorskip("deepspeed", reason="needs DeepSpeed")

HERE = Path(__file__).parent
WORKER = """
import json, sys
import deepspeed, torch
from models import LLAMA
from peft import get_peft_model
from transformers.integrations import HfDeepSpeedConfig
from mora import MoraConfig, MoraLayer
from mora_repro.training import load_extensions

load_extensions()  # no killed process's lock holds it up

def made():
    model = LLAMA.model()
    torch.manual_seed(1)
    return get_peft_model(model, MoraConfig(r=3, init_weights=False, **json.loads(sys.argv[1]), **LLAMA.config)).train()

def trained(model):
    return [p for p in model.parameters() if p.requires_grad]

def loss(model):
    return model(**LLAMA.batch()).logits.pow(2).mean()

plain, losses = made(), []
optimizer = torch.optim.SGD(trained(plain), lr=1e-2)
for _ in range(3):
    losses.append(loss(plain))
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
losses = [value.item() for value in (*losses, loss(plain))]

config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # DeepSpeed's default is 1
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
kept = HfDeepSpeedConfig(config)
model = made()
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained(model), lr=1e-2), config=config)
sharded = []
for _ in range(3):
    value = loss(engine)
    engine.backward(value)
    engine.step()
    sharded.append(value.item())

def now():
    with torch.no_grad():
        value = loss(engine).item()
    engine.empty_partition_cache()  # weights that it keeps for the next pass, those of `use_dora` among them
    return value

sharded.append(now())
torch.testing.assert_close(sharded, losses, rtol=1e-5, atol=1e-6)
layer = next(module for module in model.modules() if isinstance(module, MoraLayer))
weight = layer.get_base_layer().weight
assert weight.numel() == 0, "the base weight should be partitioned"
for safe in (False, True):
    model.merge_adapter(safe_merge=safe)
    assert layer.merged and weight.numel() == 0
    assert abs(now() - losses[-1]) < 1e-5
    with deepspeed.zero.GatheredParameters([weight]):
        merged = weight.detach().clone()
    model.unmerge_adapter()
    with deepspeed.zero.GatheredParameters([weight]):
        assert (merged - weight).abs().max() > 1e-3, "merging should change the base weight"
    assert abs(now() - losses[-1]) < 1e-5
print("all held")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [{"operator": "rotation"}, {"operator": "sharing"}, {"operator": "rotation", "use_dora": True}], ids=str
)
def test_training_and_merging_under_zero_3_is_as_without(config, tmp_path):
    build_extensions()
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    environment = alone(29700, HERE)
    done = subprocess.run(
        [sys.executable, str(worker), json.dumps(config)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0 and "all held" in done.stdout, done.stderr[-3000:]
