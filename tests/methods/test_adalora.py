"""AdaLoRA: the schedule, ranks that fall to the target, and a state that makes a resume exact."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mora_repro.errors import UserError
from mora_repro.methods import apply_method, load_base, load_tokenizer
from mora_repro.methods.adalora import AllocateRank, allocator_state, load_allocator_state, schedule
from mora_repro.spec import RunSpec, compose_config

STEPS = 12
SMALL = [
    "scale=mini",
    "model.base=null",
    "model.architecture.hidden_size=16",
    "model.architecture.intermediate_size=24",
    "model.architecture.num_hidden_layers=1",
    "model.architecture.num_attention_heads=2",
    "method=adalora",
]


def spec(*overrides: str) -> RunSpec:
    return RunSpec.from_config(compose_config([*SMALL, *overrides]))


def adapted():
    run = spec("r=2")
    torch.manual_seed(0)
    return apply_method(load_base(run, load_tokenizer(run), None), run, STEPS)


def ranks(model) -> int:
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)


@pytest.mark.parametrize("steps", [None, 1, 2, 7, 300, 100_000])
def test_the_schedule_follows_the_number_of_steps(steps):
    made = schedule(steps)
    assert steps is None or made["total_step"] == steps
    assert 0 <= made["tinit"] < made["total_step"] - made["tfinal"]


def test_it_starts_with_half_more_ranks_and_can_be_overridden():
    config = adapted().peft_config["default"]
    assert (config.init_r, config.target_r) == (3, 2)
    assert (config.total_step, config.tinit, config.tfinal) == (STEPS, 1, 6)
    run = spec("r=2", "+method.peft.tinit=0")
    model = apply_method(load_base(run, load_tokenizer(run), None), run, STEPS)
    assert model.peft_config["default"].tinit == 0


def test_the_ranks_fall_to_the_target_in_the_trainer(tmp_path):
    model = adapted()
    ids = torch.randint(3, 250, (8, 12), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[AllocateRank(model, 1)]).train()
    assert ranks(model) == 2 * 7


def test_a_bfloat16_base_trains_no_rank_numbers():
    run = spec("r=2")
    model = apply_method(load_base(run, load_tokenizer(run), None).bfloat16(), run, STEPS)
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_E"}


@pytest.mark.parametrize("stopped", [3, 6, 9])  # ranks fall, are fixed, are kept
def test_the_state_makes_a_resume_exact(stopped):
    ids = torch.randint(3, 250, (STEPS, 2, 12), generator=torch.Generator().manual_seed(0))

    def train(model, optimizer, first, last):
        for step in range(first, last):
            model(input_ids=ids[step], labels=ids[step]).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()

    def made():
        model = adapted()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    whole, optimizer = made()
    train(whole, optimizer, 0, STEPS)
    cut, optimizer = made()
    train(cut, optimizer, 0, stopped)
    weights, moments, state = cut.state_dict(), optimizer.state_dict(), allocator_state(cut)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    again, optimizer = made()
    again.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    load_allocator_state(again, state)
    train(again, optimizer, stopped, STEPS)
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    kept = again.peft_config["default"].rank_pattern
    assert kept == whole.peft_config["default"].rank_pattern and ranks(again) == 2 * 7


@pytest.mark.parametrize("trainer", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_deepspeed_is_refused_with_what_can(trainer):
    with pytest.raises(UserError, match=f"trainer={trainer}: AdaLoRA reads gradients.*trainer=ddp"):
        spec(f"trainer={trainer}")
