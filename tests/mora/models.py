"""Tiny random models of the four kinds that the conformance tests run on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 24)
        self.second = nn.Linear(24, 18, bias=False)
        self.head = nn.Linear(18, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


@dataclass(frozen=True)
class Kind:
    """How to make the model, its MoRA arguments, and a batch of three samples."""

    name: str
    config: dict[str, Any]
    modules_to_save: list[str]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        if self.name == "llama":
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=50,
                    hidden_size=32,
                    intermediate_size=44,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    initializer_range=0.2,
                )
            ).eval()
        if self.name == "gpt2":
            config = GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
            return GPT2LMHeadModel(config).eval()
        if self.name == "bert":
            return BertForSequenceClassification(
                BertConfig(
                    vocab_size=50,
                    hidden_size=24,
                    intermediate_size=36,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    initializer_range=0.2,
                    num_labels=3,
                )
            ).eval()
        return MLP().eval()

    def batch(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        if self.name == "mlp":
            return {"x": torch.randn(3, 10, generator=generator)}
        return {"input_ids": torch.randint(0, 50, (3, 9), generator=generator)}


LLAMA = Kind("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, ["lm_head"])
GPT2 = Kind("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "task_type": "CAUSAL_LM"}, ["lm_head"])
BERT = Kind(
    "bert",
    {"target_modules": ["query", "value", "dense"], "exclude_modules": ["bert.pooler.dense"], "task_type": "SEQ_CLS"},
    ["classifier"],
)
MLP_KIND = Kind("mlp", {"target_modules": ["first", "second"]}, ["head"])
KINDS = [LLAMA, GPT2, BERT, MLP_KIND]


def logits(model: nn.Module, batch: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(**batch, **kwargs)
    return getattr(output, "logits", output)
