"""A model folder shaped like the hub's `meta-llama/Meta-Llama-3-8B`, and a GGUF file of the same model.

What matters of that repository: bfloat16 weights with a language-model head in several safetensors files, a `tokenizer.json`
that puts a token before each text and none behind, and no padding token anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORDS = 320
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
HEADS, KV_HEADS, LAYERS = 4, 2, 2

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": WORDS,
}


def build_llama_folder(folder: Path, *, shards: int = 3) -> Path:
    """Write config, sharded weights and tokenizer into a new folder and return it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    settings = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    train_tokenizer().save(str(folder / "tokenizer.json"))
    weights = llama_weights()
    names, placed = list(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def llama_weights() -> dict[str, Tensor]:
    """Return the bfloat16 tensors of the hub's checkpoint by name: body and language-model head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    return {name: (weight * 4).bfloat16().clone() for name, weight in model.state_dict().items()}


def train_tokenizer() -> Any:
    """Train a byte-level tokenizer as Llama 3's: a token before every text, none behind, no padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from wlora.data.synthetic.story import sample_texts

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(list(sample_texts()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def write_gguf(file: Path, *, kind: str = "Q8_0", architecture: str = "llama", add_bos: bool = False) -> Path:
    """Write the same model as llama.cpp would convert it, its linears and words in blocks of the given kind."""
    import gguf

    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_rope_dimension_count(CONFIG["hidden_size"] // HEADS)
    writer.add_vocab_size(WORDS)
    content = json.loads(train_tokenizer().to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(sorted(content["vocab"], key=content["vocab"].get))
    writer.add_token_types([3 if token in (BOS, EOS) else 1 for token in sorted(content["vocab"], key=content["vocab"].get)])
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    if add_bos:
        writer.add_add_bos_token(True)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in llama_weights().items():
        values = _interleave(name, weight.float().numpy())
        plain = values.ndim == 1
        blocks = values if plain else gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        stem = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{stem}.weight", blocks, raw_dtype=None if plain else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleave(name: str, weight: np.ndarray) -> np.ndarray:
    """Order the rows of queries and keys as llama.cpp rotates them: pairs side by side instead of halves."""
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
