"""Tiny model folders of many families with random weights, as `save_pretrained` writes them, and a local hub with one.

The tokenizer is the word-level one of the synthetic stories; it writes what the family's own does: which special tokens,
in which places, and whether there is a padding token.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from wlora.models.tiny import build_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
_DECODER = {**_SMALL, "num_key_value_heads": 1, "head_dim": 16}
_BART: dict[str, Any] = {
    **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in (("layers", 2), ("attention_heads", 2))},
    **{"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 512, "init_std": 0.1},
}
_T5: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
_DEBERTA = {**_SMALL, "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_ROBERTA = {**_SMALL, "max_position_embeddings": 514, "type_vocab_size": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _SMALL,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "initializer_range": 0.1},
    "electra": {**_SMALL, "embedding_size": 16},
    "albert": {**_SMALL, "embedding_size": 16},
    "mpnet": {**_SMALL, "max_position_embeddings": 514},
    "deberta": _DEBERTA,
    "deberta-v2": {**_DEBERTA, "share_att_key": True, "position_biased_input": False},
    "modernbert": {**_SMALL, "global_attn_every_n_layers": 2},
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART,
    "mbart": _BART,
    "pegasus": _BART,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.1},
    "gpt_neox": _SMALL,
    "opt": {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.1},
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gemma2": {**_DECODER, "query_pre_attn_scalar": 16},
    "phi3": _DECODER,
}
"""The sizes of a tiny model of each family, by `model_type`."""

DECODERS = ("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
GENERATORS = ("pegasus",)
"""The families without a head for classification."""


def build_model_folder(family: str, folder: Path, **changes: Any) -> Path:
    """Write config, weights and tokenizer of a tiny model into a new folder and return it.

    Args:
        family: a key of `FAMILIES`.
        folder: the folder, named like the repository.
        changes: further keys of `config.json`, or other values.
    """
    tokenizer = _tokenizer(family)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    # Rows to spare, as in most checkpoints: transformers' class for a family may add tokens of its own.
    settings = {"vocab_size": len(tokenizer) + 8, **special, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if family in GENERATORS else AutoModelForSequenceClassification
    model = kind.from_config(config)
    # The hub's checkpoints are of pretraining, so there is no trained head.
    model.base_model.save_pretrained(folder)
    if family in GENERATORS:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fill_cache(folder: Path, home: Path, repository: str) -> None:
    """Lay out a model folder as what the hub's library leaves behind after a download of `repository`."""
    stored = home / "hub" / f"models--{repository.replace('/', '--')}"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, stored / "snapshots" / COMMIT)


def change_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a value of None removes the key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    from tokenizers import processors

    tokenizer = build_tokenizer()
    names = ["input_ids", "attention_mask"]
    if family in DECODERS:
        # One token before a text, none behind, no padding token.
        before = processors.TemplateProcessing(
            single="[CLS] $A", pair="[CLS] $A $B:1", special_tokens=[("[CLS]", tokenizer.cls_token_id)]
        )
        tokenizer.backend_tokenizer.post_processor = before
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            model_input_names=names,
            bos_token="[CLS]",
            eos_token="[SEP]",
            unk_token="[UNK]",
        )
    if family in ("t5", "mt5", "bart", "mbart", "pegasus"):
        # The end of a text must be told once: between two texts is another token.
        ending = processors.TemplateProcessing(
            single="$A [SEP]",
            pair="$A [MASK] $B:1 [SEP]:1",
            special_tokens=[("[SEP]", tokenizer.sep_token_id), ("[MASK]", tokenizer.mask_token_id)],
        )
        tokenizer.backend_tokenizer.post_processor = ending
    tokenizer.model_input_names = [*names, "token_type_ids"] if family in ("bert", "electra", "albert") else names
    return tokenizer
