"""Folders shaped like the hub's BART-large and Llama 3 8B: what is loaded from them, and whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import compose
from tests.support.bart_folder import CONFIG as BART
from tests.support.bart_folder import bart_weights, build_bart_folder
from tests.support.hub_folder import build_folder, copy_folder
from tests.support.llama_folder import BOS, EOS, build_llama_folder, llama_weights
from wlora.errors import ConfigError
from wlora.models.heads import head_parameters
from wlora.models.loading import load_model
from wlora.models.source import locate
from wlora.models.tiny import build_tokenizer
from wlora.models.tokenizer import load_tokenizer

PAIR = ("Anna went to the library. Ben grabbed the ball.", "Anna is in the library.")
REAL = ("minilm", "deberta", "bart", "llama")
SMALL = ["rank=2", "task.batch_size=8", "task.max_train_rows=64", "task.max_eval_rows=32", "train.max_steps=16"]


@pytest.fixture(scope="module")
def bart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bart_folder(tmp_path_factory.mktemp("hub") / "bart-large")


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama_folder(tmp_path_factory.mktemp("hub") / "Meta-Llama-3-8B")


def load(name: str, folder: Path, *, num_labels: int = 2) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = compose(f"model={name}", f"model.path={folder}", "k=1")
    source = locate(config.model)
    tokenizer = load_tokenizer(config.model, source)
    model = load_model(config.model, source, tokenizer, head="sequence_classification", num_labels=num_labels, seed=0)
    return model, tokenizer


# Special tokens in texts -----------------------------------------------------------------------------------------------


def open_tokenizer(family: str, folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Return a family's tokenizer as transformers gives it and as a run loads it."""
    if family.startswith("tiny"):
        config = compose(f"model={family}", "task=story_nli").model
        return build_tokenizer(), load_tokenizer(config, locate(config))
    if family == "minilm":
        config = compose("model=minilm", "k=1").model
        location = locate(config).location
    else:
        build, name = {
            "deberta": (build_folder, "deberta_v3_base"),
            "bart": (build_bart_folder, "bart_large"),
            "llama": (build_llama_folder, "llama3_8b"),
        }[family]
        location = str(build(folder / family))
        config = compose(f"model={name}", f"model.path={location}", "k=1").model
    return AutoTokenizer.from_pretrained(location), load_tokenizer(config, locate(config))


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_deberta", "tiny_bart", "tiny_llama", *REAL])
def test_a_special_token_in_a_text_is_plain_text_and_other_texts_are_encoded_as_ever(family: str, tmp_path: Path) -> None:
    plain, tokenizer = open_tokenizer(family, tmp_path)
    texts = [*PAIR, "Ann's ball [a] <b> </c> is (red)…  7 漢", ""]
    for first, second in zip(texts, reversed(texts), strict=True):
        before, now = plain([first], [second]), tokenizer([first], [second])
        assert now["input_ids"] == before["input_ids"] and now.encodings[0].offsets == before.encodings[0].offsets
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert special

    def count(*pair: str) -> int:
        return sum(token in special for token in tokenizer(*pair)["input_ids"])

    for mark in {*tokenizer.all_special_tokens, *plain.all_special_tokens}:
        for text in (mark, f"the {mark} ball", f"the{mark}ball", f"{mark}{mark} the", f"the ball{mark}"):
            assert count(text) == count("the ball") and count(text, text) == count("the", "ball"), (mark, text)
            encoding = tokenizer([text]).encodings[0]
            covered = {at for start, end in encoding.offsets for at in range(start, end)}
            assert covered >= {at for at, character in enumerate(text) if not character.isspace()}, "no character is lost"
            again = tokenizer([text], max_length=4, stride=0, truncation=True, return_overflowing_tokens=True)
            assert all(sum(token in special for token in ids) == count("the ball") for ids in again["input_ids"])


def test_barts_classifier_reads_any_text(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    """It compares the number of end tokens of all texts of a batch."""
    rows = [{"sentence": f"Ben took the {'[SEP] ' * (n % 3)}ball", "label": n % 2} for n in range(16)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["task=sst2", f"task.path={tmp_path}", "model=tiny_bart", "method=lora", "task.batch_size=8"]
    record = run_tiny(*words, "train.max_steps=2", "warmup=0")
    assert record.status == "success" and record.metrics["loss"] > 0


# BART ----------------------------------------------------------------------------------------------------------------


def test_barts_body_is_the_bare_models_in_float32(bart_folder: Path) -> None:
    model, _ = load("bart_large", bart_folder)
    parameters = dict(model.named_parameters())
    for name, half in bart_weights().items():
        if name != "shared.weight":
            assert torch.equal(parameters[f"model.{name}"], half.float()), name
    assert torch.equal(model.get_input_embeddings().weight, bart_weights()["shared.weight"].float())
    assert {name.split(".")[0] for name in head_parameters(model)} == {"classification_head"}
    assert model.config.num_labels == 2, "the repository's three labels are of another task"
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in model.parameters())


def test_barts_tokenizer_reads_vocabulary_and_merges(bart_folder: Path) -> None:
    _, tokenizer = load("bart_large", bart_folder)
    ids = tokenizer(*PAIR)["input_ids"]
    assert tokenizer.decode(ids) == f"<s>{PAIR[0]}</s></s>{PAIR[1]}</s>"
    assert ids.count(BART["eos_token_id"]) == 3 and tokenizer.unk_token_id not in ids
    assert len(ids) < 0.8 * len("".join(PAIR)), "words were merged, not read byte by byte"
    assert tokenizer.pad_token_id == BART["pad_token_id"]


def test_bart_with_half_a_vocabulary_is_refused(bart_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(bart_folder, tmp_path / "copy")
    (folder / "merges.txt").unlink()
    (folder / "vocab.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        load("bart_large", folder)


# Llama ---------------------------------------------------------------------------------------------------------------


def test_llamas_body_comes_from_all_shards_without_the_language_models_head(llama_folder: Path) -> None:
    assert len(list(llama_folder.glob("model-*-of-00003.safetensors"))) == 3
    model, _ = load("llama3_8b", llama_folder)
    parameters = dict(model.named_parameters())
    body = {name: weight for name, weight in llama_weights().items() if name.startswith("model.")}
    assert set(parameters) == {*body, "score.weight"}
    assert all(torch.equal(parameters[name], weight.float()) for name, weight in body.items())


def test_a_missing_shard_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(llama_folder, tmp_path / "copy")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match="the weights cannot be loaded") as caught:
        load("llama3_8b", folder)
    assert len(str(caught.value).splitlines()) <= 2


def test_llama_pads_with_its_end_token_and_reads_the_last_real_one(llama_folder: Path) -> None:
    model, tokenizer = load("llama3_8b", llama_folder)
    assert "pad_token" not in json.loads((llama_folder / "tokenizer_config.json").read_text())
    assert (tokenizer.pad_token, tokenizer.bos_token) == (EOS, BOS)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer([PAIR[0], PAIR[1]], padding=True, return_tensors="pt")
    assert tokenizer.pad_token_id in batch["input_ids"][1] and tokenizer.pad_token_id not in batch["input_ids"][0]
    with torch.no_grad():
        together = model(**batch).logits
        alone = model(**tokenizer(PAIR[1], return_tensors="pt")).logits
        model.config.pad_token_id = None
        with pytest.raises(ValueError, match="padding token"):
            model(**batch)
    assert torch.allclose(together[1], alone[0], atol=1e-5)


def test_a_tokenizer_that_cannot_pad_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(llama_folder, tmp_path / "copy")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ConfigError, match="neither a padding nor an end-of-sequence token"):
        load("llama3_8b", folder)


def test_a_tokenizer_without_the_token_that_the_heads_read_is_refused(bart_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(bart_folder, tmp_path / "bart")
    _, tokenizer = load("bart_large", folder)
    bare = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}  # type: ignore[attr-defined]
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="puts no eos_token behind a text, which a bart model's heads need"):
        load("bart_large", folder)


@pytest.mark.parametrize("given", [{"cls_token": "[CLS]"}, {}])
def test_bert_without_its_first_token_is_refused(given: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    config = compose("model=tiny_bert", "task=story_nli").model
    load_model(config, locate(config), build_tokenizer(), head="question_answering", num_labels=2, seed=0).save_pretrained(
        folder
    )
    bare = json.loads(build_tokenizer().backend_tokenizer.to_str()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]", **given}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    config.path = str(folder)
    with pytest.raises(ConfigError, match="puts no cls_token before a text, which a bert model's heads need") as caught:
        load_tokenizer(config, locate(config))
    assert len(str(caught.value).splitlines()) == 1


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bart_large", "llama3_8b"])
@pytest.mark.parametrize("method", ["lora", "wlora", "wlora_plus"])
def test_the_papers_methods_run_on_all_linears(
    name: str, method: str, bart_folder: Path, llama_folder: Path, run_tiny: Any
) -> None:
    folder = bart_folder if name == "bart_large" else llama_folder
    words = [f"model={name}", f"model.path={folder}", f"method={method}", "targets=all", "k=5", *SMALL]
    record = run_tiny(*words)
    n = {"bart_large": 2 * 6 + 2 * 10, "llama3_8b": 2 * 7}[name]
    assert record.status == "success"
    assert len(record.adapters) <= {"lora": n, "wlora": 5, "wlora_plus": 5}[method]
    assert record.model["fingerprint"] and record.parameters["stored"] == record.parameters["total"]


@pytest.fixture(scope="module")
def stsb_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small STS-B in the benchmark's columns: 5 for equal sentences, 0 for others."""
    folder = tmp_path_factory.mktemp("data") / "stsb"
    folder.mkdir()
    pairs = [(f"{one} left.", f"{other} left.") for one in ("Anna", "Ben", "Clara") for other in ("Anna", "Ben", "Clara")]
    for split, number in (("train", 64), ("validation", 32)):
        rows = [
            {"sentence1": one, "sentence2": other, "label": 5.0 * (one == other)} for one, other in (pairs * number)[:number]
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_stsb_runs_on_llama_with_both_correlations(llama_folder: Path, stsb_folder: Path, run_tiny: Any) -> None:
    words = ["task=stsb", f"task.path={stsb_folder}", "model=llama3_8b", f"model.path={llama_folder}", "method=lora"]
    record = run_tiny(*words, *SMALL, "task.max_train_rows=null")
    assert record.primary_metric == "corr"
    assert {"pearson", "spearman", "corr", "loss"} == set(record.metrics)
    assert -1 <= record.metrics["pearson"] <= 1 and -1 <= record.metrics["spearman"] <= 1
    assert record.metrics["corr"] == pytest.approx((record.metrics["pearson"] + record.metrics["spearman"]) / 2)
    assert record.parameters["head"] == 64, "one output without bias"


def test_table_3_takes_its_steps_and_batches_from_table_8(llama_folder: Path, stsb_folder: Path, run_tiny: Any) -> None:
    config = compose("experiment=table3", "task=stsb", f"model.path={llama_folder}", "k=5")
    assert (config.train.max_steps, config.task.batch_size, config.train.accumulation_steps) == (256, 16, 2)
