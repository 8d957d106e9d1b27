"""Base models and tokenizers: from the hub, a folder or a GGUF file, or made from an architecture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GgufConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..data.task import build_task
from ..errors import UserError
from ..spec import RunSpec

SMALL = ("*.json", "*.txt", "*.model", "*.py", "*.jinja")  # the files of a model beside its weights
VOCABULARY = 1024  # tokens of `model.tokenizer=task`
_NOT_LOADED = (OSError, ValueError, SafetensorError)  # what transformers raises of files that are not there or broken


def load_tokenizer(spec: RunSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer; `bytes` is one token per byte (ByT5's vocabulary without its extra ids), `task` learns its
    tokens from the task's world.

    Raises UserError where it can't be found.
    """
    source = spec.model.tokenizer or spec.model.pretrained
    if source == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    if source == "task":
        return byte_pairs(build_task(spec).vocabulary(), VOCABULARY)
    assert source is not None  # a model without `pretrained` names its tokenizer (conf/model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**_located(source, spec))
    except _NOT_LOADED as error:
        raise _not_found("tokenizer", source, error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {source} has no end token, by which an answer is known to be over. Give it one: "
            f'load it in Python, tokenizer.add_special_tokens({{"eos_token": "</s>"}}), for "</s>" a token that the '
            f"model knows; tokenizer.save_pretrained(<folder>); then model.tokenizer=<folder>"
        )
    if tokenizer.pad_token_id is None:
        # Padded positions carry no label and no attention, so that any token serves.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def byte_pairs(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of byte pairs (any text can be written in it) that learned its at most `size` tokens from texts."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    learner.decoder = ByteLevelDecoder()
    special = ["<pad>", "</s>"]
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learner, pad_token="<pad>", eos_token="</s>")


def computes_in_bf16(spec: RunSpec) -> bool:
    """As `trainer.precision` says; else at scale paper, on a GPU that has it. Mini is fp32 everywhere, so that its
    numbers can be compared."""
    if spec.trainer.precision:
        return spec.trainer.precision == "bf16"
    return spec.scale == "paper" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def precision(spec: RunSpec) -> Literal["bf16", "fp32"]:
    """What a run computes in on this machine."""
    return "bf16" if computes_in_bf16(spec) else "fp32"


def load_base(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, weights: Path | None) -> PreTrainedModel:
    """The model before the method.

    Args:
        weights: folder of the trained base of a model made from scratch, or None.

    Where it is computed in bfloat16, adapters take a bfloat16 base; full training keeps fp32 weights, which under ZeRO
    are the optimizer's.

    Raises UserError: a model that isn't there, or that is no causal language model, or has not the attention asked for.
    """
    low = computes_in_bf16(spec) and (spec.method.peft or spec.trainer.stage)
    how: dict[str, Any] = {"dtype": torch.bfloat16 if low else torch.float32}
    if spec.trainer.attention:
        how["attn_implementation"] = spec.trainer.attention
    try:
        if weights is not None:
            return AutoModelForCausalLM.from_pretrained(weights, **how)
        config = _config(spec, tokenizer)
        if spec.model.pretrained is None:
            return AutoModelForCausalLM.from_config(config, **how)
    except ImportError as error:
        raise _no_attention(spec, error) from error
    source = spec.model.pretrained
    if is_gguf(source):
        how["quantization_config"] = GgufConfig(dequantize=True)  # into weights that can be trained and saved
    try:
        return AutoModelForCausalLM.from_pretrained(config=config, **_located(source, spec), **how)
    except ImportError as error:
        raise _no_attention(spec, error) from error
    except _NOT_LOADED as error:
        raise _not_found("model", source, error) from error


def download(spec: RunSpec) -> None:
    """Put the pretrained model and its tokenizer into the cache of the hub, for a machine without internet.

    Raises UserError where it can't be had.
    """
    source = spec.model.pretrained
    if source is None or Path(source).exists():
        return
    try:
        folder = snapshot_download(source, revision=spec.model.revision, allow_patterns=[*SMALL, "*.safetensors"])
        if not any(Path(folder).glob("*.safetensors")):
            snapshot_download(source, revision=spec.model.revision, allow_patterns="*.bin")
    except (OSError, ValueError) as error:
        raise _not_found("model", source, error) from error


def refuse_too_long(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Raises UserError where samples of `longest` tokens and the method's virtual tokens have no place in the model."""
    positions = getattr(_config(spec, tokenizer).get_text_config(), "max_position_embeddings", None)
    virtual = (spec.method.peft or {}).get("num_virtual_tokens", 0)
    if positions is not None and virtual + longest > positions:
        beside = f" beside {virtual} virtual tokens" if virtual else ""
        raise UserError(
            f"task={spec.task['name']} has samples of {longest} tokens, and model={spec.model.name} has {positions} "
            f"positions{beside}. Cut them: training.max_length={max(1, positions - virtual)}"
        )


def on_meta_device(spec: RunSpec) -> PreTrainedModel:
    """The base model's shapes without its memory, from `architecture` (or the pretrained config)."""
    config = LlamaConfig(**spec.model.architecture) if spec.model.architecture else _config(spec, None)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _config(spec: RunSpec, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """The model's configuration: of the pretrained model, or of a LLaMA of the given architecture."""
    source = spec.model.pretrained
    if source is None:
        assert spec.model.architecture is not None and tokenizer is not None
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return LlamaConfig(**{"vocab_size": len(tokenizer), **special, **spec.model.architecture})
    try:
        config = AutoConfig.from_pretrained(**_located(source, spec))
    except _NOT_LOADED as error:
        raise _not_found("model", source, error) from error
    named = config.architectures or []
    causal = type(config) in AutoModelForCausalLM._model_mapping
    # An encoder such as BERT has a causal head class too; what the checkpoint names decides.
    if not causal or (named and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)):
        raise UserError(
            f"model.pretrained={source} is a {' / '.join(named) or config.model_type}, no causal language "
            f"model, and the tasks generate text. Choose one such as a LLaMA, or the built-in one: model=mini"
        )
    return config


def is_gguf(source: str) -> bool:
    """Whether a model's source is a GGUF file, llama.cpp's format of a model and its tokenizer in one."""
    return source.endswith(".gguf")


def _located(source: str, spec: RunSpec) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say what is loaded."""
    which = {"revision": spec.model.revision, "trust_remote_code": spec.model.trust_remote_code}
    if is_gguf(source):
        return {"pretrained_model_name_or_path": str(Path(source).parent), "gguf_file": Path(source).name, **which}
    return {"pretrained_model_name_or_path": source, **which}


def _no_attention(spec: RunSpec, error: ImportError) -> UserError:
    return UserError(
        f"trainer.attention={spec.trainer.attention} can't be had here: {str(error).splitlines()[0]}. "
        f"PyTorch's own, which uses flash kernels on GPUs: trainer.attention=sdpa"
    )


def _not_found(what: str, source: str, error: Exception) -> UserError:
    """What to do about a model or tokenizer that transformers could not load."""
    if Path(source).exists():
        return UserError(f"the {what} in {source} can't be loaded: {str(error).splitlines()[0]}")
    if source.startswith(("/", ".", "~")):
        return UserError(
            f"the {what} {source} is not there. Name a folder or a file.gguf that is, or a model of the hub by its id"
        )
    return UserError(
        f"the {what} {source!r} is neither a local folder nor to be had from the hub "
        f"({str(error).splitlines()[0]}). If it is gated, ask for access on its page and log in with "
        f"`hf auth login`; a local copy: model=hf model.pretrained=<folder or file.gguf>; offline: model=mini "
        f"scale=mini"
    )
