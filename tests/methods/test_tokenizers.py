"""Tokenizers without the special tokens that training needs: what is made of them, or said."""

import pytest
import torch
from tiny import TINY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mora_repro.data.tokens import Example
from mora_repro.errors import UserError
from mora_repro.methods import load_tokenizer
from mora_repro.spec import RunSpec, compose_config
from mora_repro.training.train import Collator


@pytest.fixture
def saved(tmp_path):
    """Saves a tokenizer with these special tokens and gives the spec of a run that uses it."""

    def save(**special: str) -> RunSpec:
        vocabulary = {token: index for index, token in enumerate(["one", *special.values()])}
        model = WordLevel(vocabulary, unk_token=special.get("unk_token", "one"))
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special).save_pretrained(tmp_path)
        return RunSpec.from_config(compose_config([*TINY, f"model.tokenizer={tmp_path}"]))

    return save


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"eos_token": "</s>", "unk_token": "<unk>"}, "<unk>"),
        ({"eos_token": "</s>"}, "</s>"),
        ({"eos_token": "</s>", "pad_token": "<pad>"}, "<pad>"),
    ],
)
def test_a_tokenizer_without_a_pad_token_pads_with_another(saved, special, pad):
    assert load_tokenizer(saved(**special)).pad_token == pad


def test_padding_changes_no_loss_whatever_token_it_is():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes)).eval()
    # The end token, 2, stands in the samples too.
    short, long = Example([1, 3, 2], [-100, 3, 2]), Example([1, 4, 5, 6, 7, 8, 2], [-100, -100, 5, 6, 7, 8, 2])

    def loss(*examples: Example, pad: int) -> float:
        return model(**Collator(pad)(list(examples))).loss.item()

    alone = (2 * loss(short, pad=0) + 5 * loss(long, pad=0)) / 7  # they have two and five trained tokens
    assert loss(short, long, pad=2) == pytest.approx(alone, rel=1e-6)
    assert loss(short, long, pad=0) == loss(short, long, pad=2)


@pytest.mark.parametrize("special", [{}, {"unk_token": "<unk>"}, {"pad_token": "<pad>"}])
def test_a_tokenizer_without_an_end_token_is_an_error_that_says_how_to_give_it_one(saved, special):
    with pytest.raises(UserError, match=r"no end token.*add_special_tokens.*model.tokenizer=<folder>"):
        load_tokenizer(saved(**special))


def test_what_the_error_says_works(saved, tmp_path):
    run = saved()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"eos_token": "one"})
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(run).eos_token == load_tokenizer(run).pad_token == "one"
