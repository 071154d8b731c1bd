"""Families that are not described: what is found in them, what `targets` selects, and what is refused before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.conftest import compose
from tests.support.model_folders import FAMILIES, build_model_folder, change_json, fill_cache
from wlora.adapters.adapter_set import AdapterSet
from wlora.adapters.layer import LowRankAdapter
from wlora.config.schema import TARGET_SETS
from wlora.data import hub
from wlora.errors import ConfigError
from wlora.experiment.dry_run import describe
from wlora.experiment.run import run
from wlora.models.discovery import discover
from wlora.models.heads import AUTO, make_config
from wlora.models.layout import FAMILIES as DESCRIBED
from wlora.models.layout import described_layout
from wlora.models.linears import base_weight
from wlora.models.loading import checkpoint_activations, load_base
from wlora.models.source import locate
from wlora.models.targets import Target, count_targets, find_layout, list_targets, name_kinds, select_targets
from wlora.models.tokenizer import load_tokenizer
from wlora.storage.records import Record

FUSED = {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "modernbert": ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
}
# Longest texts of the tiny models: RoBERTa's and MPNet's tables of 514 rows begin behind the padding's.
LONGEST = {"roberta": 512, "mpnet": 512, "gpt2": 512, "opt": 512, "mbart": 512, "pegasus": 512, "t5": None, "gpt_neox": None}


def architecture_of(family: str) -> dict[str, Any]:
    return {"model_type": family, "vocab_size": 90, "pad_token_id": 1, **FAMILIES[family]}


def build_plain(family: str, head: str = "sequence_classification") -> Any:
    """Build a tiny model without weights."""
    with torch.device("meta"):
        return AUTO[head].from_config(make_config(architecture_of(family), num_labels=3))


@pytest.mark.parametrize("family", DESCRIBED)
def test_what_is_discovered_of_a_described_family_is_its_description(family: str) -> None:
    for head in ("sequence_classification", *(["seq2seq"] if family == "bart" else [])):
        whole = make_config(architecture_of(family), num_labels=3).to_dict()
        found, described = discover(build_plain(family, head)), described_layout(whole)
        for targets in TARGET_SETS:
            assert select_targets(found, targets) == select_targets(described, targets)
        assert (found.reads, found.longest) == (described.reads, described.longest)


@pytest.mark.parametrize("family", FUSED)
def test_fused_projections_are_qkv(family: str) -> None:
    architecture = architecture_of(family)
    qkv, output, *others = FUSED[family]
    kinds = {targets: {target.kind for target in list_targets(architecture, targets)} for targets in TARGET_SETS}
    assert kinds["qkv"] == {qkv} and kinds["attention"] == {qkv, output} and kinds["all"] == {qkv, output, *others}


def test_the_sets_of_an_encoder_decoder_and_of_shared_layers() -> None:
    t5 = architecture_of("t5")
    # Three projections of self-attention in four layers, and of cross-attention in the two of the decoder.
    assert count_targets(t5, "qkv") == 4 * 3 + 2 * 3 and count_targets(t5, "all") == 4 * 4 + 2 * 4 + 4 * 2
    assert [target.layer for target in list_targets(t5, "all")][-1] == 3
    first = {head: list_targets(t5, "qkv", head)[0].name for head in ("sequence_classification", "seq2seq")}
    assert first["sequence_classification"] == f"transformer.{first['seq2seq']}"
    albert = {**architecture_of("albert"), "num_hidden_layers": 12}
    assert count_targets(albert, "all") == 6, "one adapter per shared module"


@pytest.mark.parametrize("family", LONGEST)
def test_the_longest_text_is_that_of_the_table_of_positions(family: str) -> None:
    assert find_layout(architecture_of(family)).longest == LONGEST[family]


def test_targets_are_names_ends_of_names_and_patterns() -> None:
    roberta = architecture_of("roberta")

    def names(targets: str) -> list[str]:
        return [target.name.removeprefix("roberta.encoder.layer.") for target in list_targets(roberta, targets)]

    both = ["0.attention.self.query", "0.attention.self.value", "1.attention.self.query", "1.attention.self.value"]
    assert names("query,value") == names("self.query,*.self.v*") == both
    assert names("query,value@1") == both[2:]
    assert names("roberta.encoder.layer.1.output.dense") == ["1.output.dense"]
    assert len(names("output.dense")) == 4, "the attention's ends with it, too"
    assert names("qkv,intermediate.dense") == [name for name in names("release,all") if "output" not in name]
    assert names("uery") == [], "an end begins behind a dot"


def test_an_adapter_of_conv1d_folds_into_the_transposed_weight() -> None:
    model = nn.Module()
    model.projection = Conv1D(12, 4)  # from 4 to 12
    adapters = AdapterSet(model)
    target = Target("projection", 0, "projection")
    made = adapters.attach(target, lambda d_in, d_out, _: LowRankAdapter(d_in, d_out, rank=2, scale=3.0))
    nn.init.normal_(made.B)
    x = torch.randn(5, 4)
    expected = model.projection(x)
    adapters.fold("projection")
    assert isinstance(model.projection, Conv1D)
    torch.testing.assert_close(model.projection(x), expected)
    weight = base_weight(model.projection)
    assert weight is not None and weight.shape == (12, 4)


# Folders and the hub -------------------------------------------------------------------------------------------------

SIZES = ["task=story_nli", "task.max_train_rows=32", "task.max_eval_rows=8", "train.max_steps=4", "precision=fp32"]


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_a_folder_trains_by_its_path_alone(family: str, tmp_path: Path) -> None:
    folder = build_model_folder(family, tmp_path / f"my-{family}")
    record = run(compose(*SIZES, f"model.path={folder}", f"results_dir={tmp_path}"))
    assert record.status == "success" and record.config["model"]["name"] == f"my-{family}"
    assert record.config["model"]["architecture"]["model_type"] == family
    assert record.config["train"]["accumulation_steps"] == 1, "not that of the default model"
    text = describe(compose(*SIZES, f"model.path={folder}", f"results_dir={tmp_path}", "dry_run=true"))
    assert record.run_id in text and "GiB with" in text


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path


def test_a_repository_of_the_hub_is_named_and_counted(cache: Path) -> None:
    fill_cache(build_model_folder("roberta", cache / "made"), cache, "someone/tiny-roberta")
    config = compose(*SIZES, "model=hub", "model.hub_id=someone/tiny-roberta")
    assert config.model.name == "tiny-roberta" and config.model.architecture["model_type"] == "roberta"
    assert not {"architectures", "transformers_version", "id2label"} & set(config.model.architecture)
    assert "6 of method=wlora" in describe(config)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "model.hub_id=null: allowed is OWNER/NAME"),
        (["model.hub_id='../x'"], "allowed is OWNER/NAME"),
        (
            ["model.hub_id=someone/absent"],
            "model.hub_id=someone/absent: no network, and config.json is not",
        ),
        (["model.hub_id=someone/absent", "offline=true"], "model.hub_id=someone/absent: offline, and config.json is not"),
    ],
)
def test_a_repository_that_is_not_there_is_refused(words: list[str], expected: str, cache: Path) -> None:
    assert expected in refusal("model=hub", *words)


# Bad input -----------------------------------------------------------------------------------------------------------


def refusal(*words: str) -> str:
    """Return why a configuration is refused, before anything is loaded."""
    with pytest.raises(ConfigError) as caught:
        compose("task=story_nli", *words)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def loading_refusal(folder: Path, *words: str, head: str = "sequence_classification") -> str:
    """Return why a folder is refused when it is loaded."""
    model = compose(*SIZES, f"model.path={folder}", *words).model
    with pytest.raises(ConfigError) as caught:
        tokenizer = load_tokenizer(model, locate(model))
        load_base(model, locate(model), tokenizer, head=head, num_labels=3)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def test_a_model_without_the_tasks_head_is_refused(tmp_path: Path) -> None:
    folder = build_model_folder("pegasus", tmp_path / "pegasus")
    told = refusal(f"model.path={folder}")
    assert "a pegasus model has no sequence_classification head" in told and "its seq2seq head" in told
    folder = build_model_folder("gpt2", tmp_path / "gpt2")
    told = refusal("task=story_summary", f"model.path={folder}")
    assert "a gpt2 model has no seq2seq head" in told and "bart_large" in told


@pytest.mark.parametrize("targets", ["querry", "qkv,querry", "[querry,value]", "querry@1"])
def test_targets_that_match_nothing_are_refused_with_the_names_there_are(targets: str, tmp_path: Path) -> None:
    folder = build_model_folder("roberta", tmp_path / "roberta")
    told = refusal(f"model.path={folder}", f"targets='{targets}'" if targets[0] != "[" else f"targets={targets}")
    assert told.startswith("targets=querry: allowed is qkv | attention | all | release, or names of linear modules")
    assert "attention.self.query, attention.self.key" in told
    assert "targets=qkv@7: allowed is a layer from 0 to 1" in refusal(f"model.path={folder}", "targets=qkv@7")


def test_texts_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    folder = build_model_folder("roberta", tmp_path / "roberta")
    # A table of 514 rows, of which the one of the padding (token 0) is not for texts.
    assert "task.max_length=514: allowed is at most 513" in refusal(f"model.path={folder}", "task.max_length=514")


def test_a_decoder_without_a_padding_token_pads_with_the_end_and_on_the_right(tmp_path: Path) -> None:
    folder = build_model_folder("gpt2", tmp_path / "gpt2")
    change_json(folder / "tokenizer_config.json", padding_side="left")
    model = compose(*SIZES, f"model.path={folder}").model
    tokenizer = load_tokenizer(model, locate(model))
    assert tokenizer.pad_token == tokenizer.eos_token == "[SEP]" and tokenizer.padding_side == "right"
    base, _ = load_base(model, locate(model), tokenizer, head="sequence_classification", num_labels=3)
    texts = ["Anna went to the library.", "Ben is in the school. Anna took the lamp."]
    alone = [base(**tokenizer([text], return_tensors="pt")).logits for text in texts]
    together = base(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_tokenizer_without_padding_and_end_is_refused(tmp_path: Path) -> None:
    folder = build_model_folder("gpt2", tmp_path / "gpt2")
    change_json(folder / "tokenizer_config.json", eos_token=None)
    assert "neither a padding nor an end-of-sequence token" in loading_refusal(folder)


@pytest.mark.parametrize("family", ["roberta", "t5"])
def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(family: str, tmp_path: Path) -> None:
    folder = build_model_folder(family, tmp_path / family, vocab_size=60, bos_token_id=2, sep_token_id=3)
    assert "tokens, the model 60" in loading_refusal(folder)


def test_an_encoder_decoder_that_ends_texts_otherwise_than_its_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = build_model_folder("t5", tmp_path / "t5", eos_token_id=9)
    assert "eos_token_id in config.json is 9: allowed is 3" in loading_refusal(folder)


def test_a_tokenizer_that_marks_no_end_or_beginning_is_refused(tmp_path: Path) -> None:
    for family, told in (("t5", "no eos_token behind a text"), ("roberta", "no cls_token before a text")):
        folder = build_model_folder(family, tmp_path / family)
        change_json(folder / "tokenizer.json", post_processor=None)
        assert told in loading_refusal(folder)


def test_what_a_family_cannot_do_is_refused_or_switched_off_with_a_word(
    tmp_path: Path, run_tiny: Callable[..., Record], capsys: pytest.CaptureFixture[str]
) -> None:
    albert = build_model_folder("albert", tmp_path / "albert")
    told = "train.gradient_checkpointing=true: allowed is false for albert models"
    with pytest.raises(ConfigError, match=told):
        checkpoint_activations(build_plain("albert"))
    run_tiny(*SIZES, "method=probe", f"model.path={albert}", "train.prefix_cache=memory")
    printed = capsys.readouterr().out
    assert "notice: train.prefix_cache is off: the layers of this model cannot be skipped one by one" in printed
    assert "notice: layers found in this model (model_type albert): 1 of albert.encoder.albert_layer_groups" in printed
    t5 = build_model_folder("t5", tmp_path / "t5")
    upper = run_tiny(*SIZES, "method=lora", "targets=all@1", f"model.path={t5}", "train.prefix_cache=memory")
    assert "prefix_layers" not in upper.memory, "the first layer hands on its positions"
    roberta = build_model_folder("roberta", tmp_path / "roberta")
    upper = run_tiny(*SIZES, "method=lora", "targets=all@1", f"model.path={roberta}", "train.prefix_cache=memory")
    assert upper.memory["prefix_layers"] == 1


def test_token_types_go_only_to_models_that_tell_texts_apart(tmp_path: Path) -> None:
    for family, taken in (("electra", True), ("roberta", False), ("distilbert", False)):
        folder = build_model_folder(family, tmp_path / family)
        change_json(folder / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
        model = compose(*SIZES, f"model.path={folder}").model
        encoded = load_tokenizer(model, locate(model))("Anna went.", "Ben is there.")
        assert ("token_type_ids" in encoded) is taken


def test_kinds_are_told_once_in_the_models_order() -> None:
    assert name_kinds(find_layout(architecture_of("phi3")))[:2] == ["self_attn.o_proj", "self_attn.qkv_proj"]
