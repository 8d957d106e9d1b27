"""Perplexity of held-out texts, packed into blocks as training packs them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy, pad
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ..data.benchmarks import HeldOut, Scores
from ..data.shards import blocks_of
from ..data.task import IGNORED, document
from ..data.tokens import Example, Tokeniser
from ..distributed import gather, rank, size
from ..errors import UserError
from ..training import Collator

BATCH = 4096  # tokens


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, benchmark: HeldOut, max_length: int
) -> Scores:
    """exp of the mean loss (in nats) of a token of the held-out texts, in blocks of `max_length` tokens.

    A document's first token is not predicted, and none from another document. The standard error is that of a ratio
    of sums over blocks (the delta method); the count is that of blocks. Of several processes each measures its part,
    and all have the scores of the whole.

    Raises UserError where there is no text.
    """
    texts = map(document, benchmark.texts)
    blocks = blocks_of(Tokeniser(tokenizer).all(texts, inline=True), max_length, tokenizer.pad_token_id)
    if not blocks:
        raise UserError(f"{benchmark.name} has no held-out text to measure. Give some: eval.data.perplexity=<file>")
    share = math.ceil(len(blocks) / size())
    # The same number for each, since under ZeRO 3 all take part in every forward pass: the last measure some twice.
    mine = [blocks[index % len(blocks)] for index in range(rank() * share, (rank() + 1) * share)]
    parts = gather(_losses(model, mine, Collator(tokenizer.pad_token_id, _flat(model))))
    rows = [row for part in parts for row in part][: len(blocks)]
    loss, tokens = (np.array(column) for column in zip(*rows, strict=True))
    mean = loss.sum() / tokens.sum()
    scores = Scores({benchmark.name: math.exp(mean)}, counts={benchmark.name: len(blocks)})
    if len(blocks) > 1:
        variance = ((loss - mean * tokens) ** 2).sum() * len(blocks) / (len(blocks) - 1)
        scores.stderr[benchmark.name] = math.exp(mean) * math.sqrt(variance) / tokens.sum()
    for number, (total, count) in enumerate(rows):
        scores.samples.append({"benchmark": benchmark.name, "block": number, "loss": total, "tokens": count})
    return scores


def _flat(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation == "flash_attention_2"


@torch.no_grad()
def _losses(model: PreTrainedModel, blocks: list[Example], collate: Collator) -> list[tuple[float, int]]:
    """For each block, the sum of its tokens' losses, and their number."""
    was_training = model.training
    model.eval()
    length = len(blocks[0].input_ids)
    at_a_time = max(1, BATCH // length)
    rows: list[tuple[float, int]] = []
    for start in range(0, len(blocks), at_a_time):
        batch = BatchEncoding(collate(blocks[start : start + at_a_time])).to(model.device)
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, -labels.shape[1] :].float()  # without those of virtual tokens
        losses = cross_entropy(logits[:, :-1].mT, labels[:, 1:], ignore_index=IGNORED, reduction="none")
        sums = pad(losses, (1, 0)).view(-1, length).double().sum(1)
        counts = (labels != IGNORED).view(-1, length).sum(1)
        rows += zip(sums.tolist(), counts.tolist(), strict=True)
    model.train(was_training)
    return rows
