"""Greedy generation in batches, with the KV cache."""

from __future__ import annotations

import math

import torch
from peft import PeftModel, PromptLearningConfig
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.benchmarks import Questions, Scores
from ..data.task import prompt_tokens
from ..distributed import gather, rank, size
from ..errors import UserError
from .scores import scored

BATCH = 64


def room_for_text(model: PreTrainedModel) -> int | None:
    """How many tokens prompt and answer may have together, beside the method's virtual tokens; None: no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else positions - _virtual_tokens(model)


def prompt_room(model: PreTrainedModel, questions: Questions, longest: int) -> int | None:
    """How many tokens a prompt may have beside an answer of `longest` tokens and the method's virtual tokens.

    None for a model without a limit. Raises UserError where there is no room.
    """
    room = room_for_text(model)
    if room is None:
        return None
    virtual = _virtual_tokens(model)
    positions = room + virtual
    if longest >= positions:
        raise UserError(
            f"{questions.name} allows answers of {longest} tokens, and the model has {positions} positions for prompt "
            f"and answer together. Allow shorter ones: task.max_new_tokens={positions // 4}"
        )
    if virtual + longest >= positions:
        raise UserError(
            f"{virtual} virtual tokens and an answer of {longest} do not fit into the model's {positions} positions. "
            f"Take fewer of them: r={(positions - longest) // 2 or 1}"
        )
    return room - longest


def _virtual_tokens(model: PreTrainedModel) -> int:
    """How many the adapters put in front of the input."""
    if not isinstance(model, PeftModel):
        return 0
    configs = model.peft_config.values()
    return sum(config.num_virtual_tokens for config in configs if isinstance(config, PromptLearningConfig))


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Questions) -> Scores:
    """Ask all questions; `cut_prompts` is among the metrics where any had to be cut.

    Of several processes each asks its part, and all have the scores of the whole.
    """
    prompts = [prompt_tokens(tokenizer, prompt) for prompt, _ in questions.pairs]
    longest = questions.longest(tokenizer)
    room = prompt_room(model, questions, longest) or max(map(len, prompts))
    cut = [len(prompt) > room for prompt in prompts]
    prompts = [prompt[-room:] for prompt in prompts]
    share = math.ceil(len(prompts) / size())
    # The same number for each, since under ZeRO 3 all take part in every forward pass: the last ask some twice.
    mine = [prompts[index % len(prompts)] for index in range(rank() * share, (rank() + 1) * share)]
    parts = gather(answer(model, tokenizer, mine, longest))
    answers = [text for part in parts for text in part][: len(prompts)]
    samples = []
    for text, (prompt, gold), was_cut in zip(answers, questions.pairs, cut, strict=True):
        row = {"benchmark": questions.name, "prompt": prompt, "gold": gold, "answer": text}
        metrics = {name: list(share) for name, share in questions.score(text, gold).items()}
        samples.append(row | {"metrics": metrics} | ({"cut": True} if was_cut else {}))
    return scored(samples)


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    """Greedy answers to prompts of token ids, at most `max_new_tokens` long, without special tokens.

    Greedy whatever the model's own generation config says (a repetition penalty, say), which is left as it was.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training, own = model.training, base.generation_config
    base.generation_config = settings  # `generate` takes what `settings` leave open from here
    model.eval()
    answers: list[str] = []
    # By length, so that a batch has little padding; the answers go back in the order of the prompts.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), BATCH):
        batch = [prompts[index] for index in order[start : start + BATCH]]
        width = max(len(prompt) for prompt in batch)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
        output = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=settings
        )
        answers += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    model.train(was_training)
    base.generation_config = own
    return [text for _, text in sorted(zip(order, answers, strict=True))]
