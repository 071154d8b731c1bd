"""A model folder shaped like the hub's `microsoft/deberta-v3-base`, at a width that loads in a moment.

What matters of that repository: a `config.json` without dtype and architectures whose `pos_att_type` is a string, one
float16 `pytorch_model.bin` that holds the body and two masked-LM heads but neither pooler nor classifier, and a
sentencepiece model in place of a `tokenizer.json`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 96
SPARE_ROWS = 8
"""Rows of the embedding above the sentencepiece vocabulary, as on the hub: `[MASK]` is the first of them."""

CONFIG: dict[str, Any] = {
    "model_type": "deberta-v2",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "type_vocab_size": 0,
    "vocab_size": VOCABULARY + SPARE_ROWS,
}


def build_folder(folder: Path) -> Path:
    """Write config, weights and tokenizer into a new folder and return it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}, indent=2))
    torch.save(hub_weights(), folder / "pytorch_model.bin")
    _train_sentencepiece(folder)
    return folder


def copy_folder(folder: Path, to: Path) -> Path:
    """Copy a folder, so that a test may spoil it."""
    return Path(shutil.copytree(folder, to))


def hub_weights() -> dict[str, Tensor]:
    """Return the float16 tensors of the hub's checkpoint by name: body, generator head, discriminator head."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in _shapes().items():
        drawn = torch.randn(shape, generator=generator) * 0.05
        weights[name] = (drawn + 1 if name.endswith("LayerNorm.weight") else drawn).half()
    return weights


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read a folder's `pytorch_model.bin`."""
    weights: dict[str, Tensor] = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return weights


def to_safetensors(folder: Path, *, shards: int = 1) -> Path:
    """Replace a folder's `pytorch_model.bin` by safetensors, in one file or in shards with their index."""
    from safetensors.torch import save_file

    weights = read_weights(folder)
    (folder / "pytorch_model.bin").unlink()
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    index: dict[str, Any] = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": {}}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def build_rte_folder(folder: Path, *, rows: int = 24) -> Path:
    """Write a small RTE in the benchmark's own columns; the label says whether the sentences share their place."""
    folder.mkdir(parents=True)
    places = ("library", "school", "museum", "hospital")
    for split, number in (("train", rows), ("validation", rows // 2)):
        lines = []
        for i in range(number):
            place, other = places[i % 4], places[(i + i // 4) % 4]
            row = {
                "sentence1": f"Anna went to the {place}.",
                "sentence2": f"Anna is in the {other}.",
                "label": int(place != other),
                "idx": i,
            }
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def build_table_repository(folder: Path, splits: dict[str, dict[str, list[Any]]]) -> Path:
    """Write a data set as it lies on the hub: Parquet files of the splits below `data`, without a loading script."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    for split, columns in splits.items():
        pq.write_table(pa.table(columns), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def _shapes() -> dict[str, tuple[int, ...]]:
    width, inner, words = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    linears = {"deberta.encoder.layer.{}.intermediate.dense": (inner, width)}
    for name in ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"):
        linears[f"deberta.encoder.layer.{{}}.attention.{name}"] = (width, width)
    linears["deberta.encoder.layer.{}.output.dense"] = (width, inner)
    norms = ["deberta.encoder.layer.{}.attention.output.LayerNorm", "deberta.encoder.layer.{}.output.LayerNorm"]
    once = ["deberta.embeddings.LayerNorm", "deberta.encoder.LayerNorm"]
    heads = ["lm_predictions.lm_head", "mask_predictions"]

    shapes: dict[str, tuple[int, ...]] = {
        "deberta.embeddings.word_embeddings.weight": (words, width),
        "deberta.encoder.rel_embeddings.weight": (2 * CONFIG["position_buckets"], width),
        "lm_predictions.lm_head.bias": (words,),
        "mask_predictions.classifier.weight": (1, width),
        "mask_predictions.classifier.bias": (1,),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, (d_out, d_in) in linears.items():
            shapes[f"{name.format(layer)}.weight"] = (d_out, d_in)
            shapes[f"{name.format(layer)}.bias"] = (d_out,)
        once += [name.format(layer) for name in norms]
    for head in heads:
        shapes[f"{head}.dense.weight"] = (width, width)
        shapes[f"{head}.dense.bias"] = (width,)
        once.append(f"{head}.LayerNorm")
    for name in once:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
    return shapes


def _train_sentencepiece(folder: Path) -> None:
    import sentencepiece

    from wlora.data.synthetic.story import sample_texts

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(sample_texts())),
        model_prefix=str(folder / "spm"),
        vocab_size=VOCABULARY,
        num_threads=1,
        minloglevel=2,
        # The hub's numbering: transformers reads the special pieces from the model itself.
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
    )
    (folder / "spm.vocab").unlink()
