"""A model folder shaped like the hub's `facebook/bart-large`, at a width that loads in a moment.

What matters of that repository: weights of the bare model (`encoder.…` without `model.`), a `config.json` full of
generation settings and of keys that newer versions have dropped, with labels of a task that is not ours, and a byte-level
tokenizer in `vocab.json` and `merges.txt`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORDS = 320

CONFIG: dict[str, Any] = {
    "_num_labels": 3,
    "activation_dropout": 0.1,
    "activation_function": "gelu",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "architectures": ["BartModel"],
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "classif_dropout": 0.1,
    "classifier_dropout": 0.0,
    "d_model": 32,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 2,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "early_stopping": True,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 2,
    "eos_token_id": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    "max_position_embeddings": 512,
    "model_type": "bart",
    "no_repeat_ngram_size": 3,
    "normalize_before": False,
    "num_beams": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "scale_embedding": False,
    "task_specific_params": {"summarization": {"length_penalty": 1.0, "max_length": 128, "min_length": 12, "num_beams": 4}},
    "use_cache": True,
    "vocab_size": WORDS,
}


def build_bart_folder(folder: Path) -> Path:
    """Write config, weights and tokenizer into a new folder and return it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    save_file(bart_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    _train_tokenizer(folder)
    return folder


def bart_weights() -> dict[str, Tensor]:
    """Return the float16 tensors of the bare model by name; both embeddings are `shared.weight`."""
    from transformers import BartConfig, BartModel

    known = {key: value for key, value in CONFIG.items() if key in ("d_model", "vocab_size", "max_position_embeddings")}
    known |= {key: value for key, value in CONFIG.items() if key.startswith(("encoder_", "decoder_"))}
    torch.manual_seed(0)
    weights = BartModel(BartConfig(**known)).state_dict()
    return {name: w.half().clone() for name, w in weights.items() if not name.endswith("embed_tokens.weight")}


def _train_tokenizer(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    from wlora.data.synthetic.story import sample_texts

    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(list(sample_texts()), vocab_size=WORDS, special_tokens=special, show_progress=False)
    tokenizer.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
