"""Run by test_merging.py in one or more processes: a training whose merge is looked at from inside.

python inside_a_merge.py <out.json> <overrides of conf/config.yaml ...>: rank 0 writes what it saw.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import set_seed

from mora_repro import distributed
from mora_repro.data.preparation import prepare
from mora_repro.data.task import build_task
from mora_repro.methods import apply_method, load_base, load_tokenizer
from mora_repro.spec import RunSpec, compose_config
from mora_repro.training import load_extensions, training_arguments
from mora_repro.training.merging import Merging, adapted_layers
from mora_repro.training.optimizer import adapter_parameters
from mora_repro.training.sharded import whole
from mora_repro.training.train import Collator, TaskTrainer

IDS = torch.arange(4, 24)[None]


def master(parameter):
    """The fp32 value from which the optimizer goes on, as DeepSpeed reads it; of torch, the parameter."""
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).clone()
    return parameter.detach().float().clone()


def moments(parameter, optimizer):
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_optimizer_state

        return [safe_get_full_optimizer_state(parameter, name).clone() for name in ("exp_avg", "exp_avg_sq")]
    return [optimizer.state[parameter][name].clone() for name in ("exp_avg", "exp_avg_sq")]


def largest_moment(parameters, optimizer):
    return max(float(moment.abs().max()) for p in parameters.values() for moment in moments(p, optimizer))


def value(parameter):
    with whole([parameter]):
        return parameter.detach().float().clone()


def logits(model):
    training = model.training
    with torch.no_grad():
        result = model.eval()(IDS).logits.float()
    model.train(training)
    return result


class Watched(Merging):
    """Merges, and notes what changed."""

    seen: dict

    def on_step_end(self, args, state, control, **kwargs):
        optimizer = kwargs["optimizer"].optimizer
        if hasattr(optimizer, "_hp_optimizer_states_linked"):
            # DeepSpeed's functions find the states of the first group alone, until they are linked once more.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        adapters = {n: p for n, p in adapter_parameters(self.model).items() if p.requires_grad}
        others = {n: p for n, p in self.model.named_parameters() if p.requires_grad and n not in adapters}
        if state.global_step == self.schedule.every + 1:  # the step after the merge
            self.seen["first_update"] = max(float((value(p) - self.start[n]).abs().max()) for n, p in adapters.items())
        if state.global_step != self.schedule.every:
            return
        before = logits(self.model)
        kept = {n: (value(p), master(p), *moments(p, optimizer)) for n, p in others.items()}
        base = {n: value(layer.get_base_layer().weight) for n, layer in adapted_layers(self.model).items()}
        self.seen["moments_before"] = largest_moment(adapters, optimizer)
        super().on_step_end(args, state, control, **kwargs)
        after = logits(self.model)
        self.start = {n: value(p) for n, p in adapters.items()}
        now = {n: (value(p), master(p), *moments(p, optimizer)) for n, p in others.items()}
        self.seen |= {
            "function_moved": float((after - before).abs().max()),
            "logits": float(before.abs().max()),
            "base_moved": max(
                float((value(layer.get_base_layer().weight) - base[n]).abs().max())
                for n, layer in adapted_layers(self.model).items()
            ),
            "masters_off": max(float((master(p) - self.start[n]).abs().max()) for n, p in adapters.items()),
            "moments": largest_moment(adapters, optimizer),
            "others_untouched": all(torch.equal(a, b) for n in others for a, b in zip(kept[n], now[n], strict=True)),
            "others": len(others),
            "same_on_all_ranks": len(set(distributed.gather(str([t.sum() for t in self.start.values()])))) == 1,
        }


def main() -> None:
    out, *overrides = sys.argv[1:]
    spec = RunSpec.from_config(compose_config(overrides))
    if spec.trainer.stage:
        load_extensions()
    distributed.join(deepspeed=spec.trainer.stage > 0)
    work = Path(out).parent / "work"
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(spec)
    data = prepare(spec, build_task(spec), tokenizer, Path(out).parent)
    initial = Path(out).parent / "initial"
    if distributed.is_main():
        set_seed(0)
        load_base(spec, tokenizer, None).save_pretrained(initial)
    distributed.barrier()
    arguments = training_arguments(spec, work)
    model = apply_method(load_base(spec, tokenizer, initial), spec)
    merging = Watched(spec, model)
    merging.seen = {}
    trainer = TaskTrainer(
        spec,
        dict,
        merging,
        None,
        1,
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[merging],
    )
    trainer.train()
    merging.seen["lr"] = spec.lr
    if distributed.is_main():
        Path(out).write_text(json.dumps(merging.seen))
    distributed.leave()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
