"""A GGUF file serves as a base: its weights and tokenizer are those it was made from, and can be trained and saved."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from tiny import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mora  # noqa: F401, registers MoRA in PEFT
from mora_repro.errors import UserError
from mora_repro.export import main as export
from mora_repro.methods import load_base, load_tokenizer
from mora_repro.methods.base import byte_pairs
from mora_repro.results.records import Store
from mora_repro.run import run
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.options import Options

TOKENIZER = byte_pairs(["0123456789abcdef-"], 300)
# The names of a LLaMA's weights in transformers and in llama.cpp.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    **{f"model.layers.0.self_attn.{n}_proj": f"blk.0.attn_{n}" for n in "qkv"},
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    **{f"model.layers.0.mlp.{name}_proj": f"blk.0.ffn_{name}" for name in ("gate", "up", "down")},
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A query or key weight in llama.cpp's order, which has the two numbers of each rotated pair side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=128, **sizes)).eval()


@pytest.fixture(scope="module")
def file(original: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = original.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    learned = json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(learned["vocab"], key=learned["vocab"].__getitem__))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(learned["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in learned["merges"]])
    writer.add_pad_token_id(TOKENIZER.pad_token_id)
    writer.add_eos_token_id(TOKENIZER.eos_token_id)
    for name, weight in original.state_dict().items():
        theirs = NAMES[name.removesuffix(".weight")]
        if theirs.endswith(("attn_q", "attn_k")):
            weight = interleaved(weight, config.num_attention_heads)
        writer.add_tensor(f"{theirs}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def spec(file: Path, *overrides: str) -> RunSpec:
    tiny = [text for text in TINY if not text.startswith("model.")]
    model = ["model=smollm2_135m", f"model.pretrained={file}"]
    return RunSpec.from_config(compose_config([*tiny, *model, *overrides]))


def test_weights_and_tokenizer_are_those_that_the_file_was_made_from(file, original):
    run = spec(file, "method=lora", "r=2")
    tokenizer = load_tokenizer(run)
    text = "0123-cafe é"
    assert tokenizer(text).input_ids == TOKENIZER(text).input_ids and tokenizer.eos_token == TOKENIZER.eos_token
    loaded = load_base(run, tokenizer, None)
    ids = torch.arange(60)[None]
    torch.testing.assert_close(loaded.eval()(ids).logits, original(ids).logits, rtol=0, atol=1e-6)


def test_the_identity_covers_the_files_content(file, tmp_path):
    copy = Path(shutil.copy(file, tmp_path / file.name))
    first = spec(copy).content
    assert first == {"model.pretrained": spec(file).content["model.pretrained"]}
    copy = copy.rename(tmp_path / "other.gguf")
    with copy.open("ab") as end:
        end.write(b"more")
    assert spec(copy).content != first


@pytest.mark.parametrize(("content", "said"), [(None, "x.gguf is not there"), (b"no model " * 9, "can't be loaded")])
def test_a_file_that_is_not_there_or_is_no_gguf_is_one_error(tmp_path, content, said):
    path = tmp_path / "x.gguf"
    if content:
        path.write_bytes(content)
    for load in (load_tokenizer, lambda run: load_base(run, TOKENIZER, None)):
        with pytest.raises(UserError, match=said):
            load(spec(path))


def test_a_cut_file_is_one_error(file, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(UserError, match=r"cut.gguf can't be loaded"):
        load_base(spec(tmp_path / "cut.gguf"), TOKENIZER, None)


@pytest.mark.parametrize("method", ["fft", "mora"])
def test_what_was_trained_on_it_is_exported_and_loads_in_plain_code(file, original, tmp_path, method):
    trained = run(spec(file, f"method={method}", "lr=1e-2"), Options(out=str(tmp_path)))
    assert trained.status == "finished"
    for merge in (False, True):
        folder = tmp_path / f"merged {merge}"
        export(OmegaConf.create({"run": trained.id, "merge": merge, "to": str(folder), "out": str(tmp_path)}))
    ids = torch.arange(60)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged True")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged True")("cafe").input_ids == TOKENIZER("cafe").input_ids
    assert (merged(ids).logits - original(ids).logits).abs().max() > 1e-2  # it was trained
    alone = tmp_path / "merged False"
    if method == "fft":
        plain = AutoModelForCausalLM.from_pretrained(alone)
    else:
        base = AutoModelForCausalLM.from_pretrained(alone / "base")
        torch.testing.assert_close(base(ids).logits, original(ids).logits, rtol=0, atol=1e-6)
        plain = PeftModel.from_pretrained(base, str(alone))
    torch.testing.assert_close(plain(ids).logits, merged(ids).logits, rtol=0, atol=1e-5)
    assert Store(tmp_path).load(trained.id).status == "finished"
