"""Loading a folder shaped like the hub's DeBERTaV3-base, and what is said about folders that cannot be loaded."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import RunMain, compose, run_cli
from tests.support.bombs import Bomb
from tests.support.hub_folder import (
    CONFIG,
    VOCABULARY,
    build_folder,
    build_rte_folder,
    copy_folder,
    hub_weights,
    read_weights,
    to_safetensors,
)
from wlora.errors import ConfigError
from wlora.models.heads import head_parameters
from wlora.models.loading import load_model
from wlora.models.source import locate
from wlora.models.tiny import build_tokenizer
from wlora.models.tokenizer import load_tokenizer
from wlora.reading import strict_lookups

STORY = "Anna went to the library. Ben grabbed the ball."
CLAIM = "Anna is in the library."
KEY = "deberta.encoder.layer.1.attention.self.key_proj.weight"
SHORT = ["task=rte", "rank=4", "train.max_steps=16", "task.batch_size=4", "train.accumulation_steps=1", "precision=fp32"]


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(tmp_path_factory.mktemp("hub") / "deberta-v3-base")


@pytest.fixture(scope="module")
def rte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_rte_folder(tmp_path_factory.mktemp("data") / "rte")


def load(folder: Path, *, seed: int = 0, num_labels: int = 2) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer as a run does."""
    config = compose(f"model.path={folder}")
    source = locate(config.model)
    tokenizer = load_tokenizer(config.model, source)
    model = load_model(config.model, source, tokenizer, head="sequence_classification", num_labels=num_labels, seed=seed)
    return model, tokenizer


def refusal(folder: Path) -> str:
    """Return the message with which a folder is refused: one or two lines that name `model.path`."""
    with pytest.raises(ConfigError) as caught:
        load(folder)
    text = str(caught.value)
    assert text.startswith(f"model.path={folder}: ") and len(text.splitlines()) <= 2
    return text


# What is in the folder -----------------------------------------------------------------------------------------------


def test_the_body_is_float32_equal_to_the_float16_weights_and_frozen(hub_folder: Path) -> None:
    model, _ = load(hub_folder)
    parameters = dict(model.named_parameters())
    body = {name: tensor for name, tensor in read_weights(hub_folder).items() if name.startswith("deberta.")}
    assert set(parameters) - set(head_parameters(model)) == set(body)
    for name, half in body.items():
        assert half.dtype == torch.float16 and parameters[name].dtype == torch.float32
        assert torch.equal(parameters[name], half.float()), name
    assert all(p.dtype == torch.float32 and not p.requires_grad and not p.is_meta for p in parameters.values())


def test_pos_att_type_given_as_text_means_both_kinds_of_attention(hub_folder: Path) -> None:
    model, _ = load(hub_folder)
    assert CONFIG["pos_att_type"] == "p2c|c2p" and model.config.pos_att_type == ["p2c", "c2p"]


def test_pooler_and_classifier_depend_on_the_seed_and_on_nothing_else(hub_folder: Path) -> None:
    first = {name: p.clone() for name, p in head_parameters(load(hub_folder, seed=3)[0]).items()}
    assert set(first) == {f"{module}.{part}" for module in ("pooler.dense", "classifier") for part in ("weight", "bias")}
    torch.rand(7)
    again, other = (head_parameters(load(hub_folder, seed=seed)[0]) for seed in (3, 4))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        if name.endswith("weight"):
            assert not torch.equal(parameter, other[name]), name
            assert 0.5 < float(parameter.std()) / CONFIG["initializer_range"] < 1.5


@pytest.mark.parametrize("shards", [1, 2])
def test_safetensors_in_one_file_or_in_shards_load_the_same_model(hub_folder: Path, shards: int, tmp_path: Path) -> None:
    folder = to_safetensors(copy_folder(hub_folder, tmp_path / "copy"), shards=shards)
    assert not list(folder.glob("*.bin")) and len(list(folder.glob("*.safetensors"))) == shards
    expected, loaded = (load(path)[0].state_dict() for path in (hub_folder, folder))
    assert expected.keys() == loaded.keys() and all(torch.equal(expected[name], loaded[name]) for name in expected)


def test_a_head_for_another_number_of_labels_is_replaced(hub_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    classifier = {"classifier.weight": torch.ones(5, CONFIG["hidden_size"]), "classifier.bias": torch.ones(5)}
    torch.save(hub_weights() | classifier, folder / "pytorch_model.bin")
    weight = head_parameters(load(folder)[0])["classifier.weight"]
    assert weight.shape == (2, CONFIG["hidden_size"]) and 0 < float(weight.std()) < 0.1


# The tokenizer -------------------------------------------------------------------------------------------------------


def test_the_tokenizer_cuts_as_sentencepiece_does_and_joins_pairs_as_deberta_expects(hub_folder: Path) -> None:
    import sentencepiece

    _, tokenizer = load(hub_folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(hub_folder / "spm.model"))
    first, second = reference.encode(STORY), reference.encode(CLAIM)
    encoded = tokenizer(STORY, CLAIM)
    cls, sep = 1, 2
    assert encoded["input_ids"] == [cls, *first, sep, *second, sep]
    assert tokenizer.convert_ids_to_tokens([0, cls, sep, 3]) == ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id) == (0, 3, VOCABULARY)
    assert len(tokenizer) == VOCABULARY + 1


@pytest.mark.parametrize("text", [STORY, CLAIM])
def test_a_story_survives_the_round_trip(hub_folder: Path, text: str) -> None:
    _, tokenizer = load(hub_folder)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_character_never_seen_is_unknown_and_not_padding(hub_folder: Path) -> None:
    _, tokenizer = load(hub_folder)
    ids = tokenizer("Anna 漢")["input_ids"]
    assert tokenizer.unk_token_id in ids and tokenizer.pad_token_id not in ids


# A whole run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [pytest.param("bin", marks=pytest.mark.slow), "shards"])
def test_the_papers_command_runs_from_local_copies_without_a_hub(
    variant: str, hub_folder: Path, rte_folder: Path, tmp_path: Path, run_main: RunMain
) -> None:
    folder = copy_folder(hub_folder, tmp_path / "model")
    if variant == "shards":
        to_safetensors(folder, shards=3)
    words = [*SHORT, "method=wlora_plus", f"model.path={folder}", f"task.path={rte_folder}", f"results_dir={tmp_path}"]
    if variant == "bin":
        done = run_cli(*words)
        code, error = done.returncode, done.stderr
    else:
        code, _, error = run_main(*words, "offline=true")
    assert (code, error) == (0, "")
    (file,) = (tmp_path / "records").glob("*.json")
    record = json.loads(file.read_text())
    assert record["status"] == "success" and 0 <= record["metrics"]["accuracy"] <= 1
    # 6 adapters of rank 4 and 4·(16 + 16) elements; two of them stay, at rank 12.
    assert (record["parameters"]["adapter_initial"], record["parameters"]["adapter_final"]) == (768, 768)
    assert [adapter["rank"] for adapter in record["adapters"]] == [12, 12]
    assert record["parameters"]["head"] == (16 * 16 + 16) + (2 * 16 + 2)


# What is refused -----------------------------------------------------------------------------------------------------


def write_bomb(folder: Path, kind: str) -> Path:
    """Put a bomb where the weights are, as torch would save it or as a bare pickle; returns the file it would make."""
    mark = folder.parent / "boom"
    if kind == "torch":
        torch.save({**hub_weights(), KEY: Bomb(mark)}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    return mark


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(kind: str, hub_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    mark = write_bomb(folder, kind)
    assert "nothing in it was run" in refusal(folder)
    assert not mark.exists()
    if kind == "pickle":
        pickle.loads((folder / "pytorch_model.bin").read_bytes())
        assert mark.exists(), "the bomb is a dud, so the test above shows nothing"


def test_a_pickle_bomb_ends_the_run_with_exit_code_2_and_no_record(
    hub_folder: Path, rte_folder: Path, tmp_path: Path, run_main: RunMain
) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    mark = write_bomb(folder, "torch")
    results = tmp_path / "results"
    code, _, error = run_main(*SHORT, f"model.path={folder}", f"task.path={rte_folder}", f"results_dir={results}")
    lines = error.strip().splitlines()
    assert code == 2 and len(lines) <= 2 and lines[0].startswith(f"error: model.path={folder}: ")
    assert not mark.exists() and not list(results.rglob("*.json"))


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights_are_refused(share: float, hub_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    cut(folder / "pytorch_model.bin", share)
    assert "the weights cannot be loaded (the file is incomplete or damaged)" in refusal(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_safetensors_are_refused(share: float, hub_folder: Path, tmp_path: Path) -> None:
    folder = to_safetensors(copy_folder(hub_folder, tmp_path / "copy"))
    cut(folder / "model.safetensors", share)
    assert "the weights cannot be loaded" in refusal(folder)


def test_truncated_weights_end_the_run_with_exit_code_2(
    hub_folder: Path, rte_folder: Path, tmp_path: Path, run_main: RunMain
) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    cut(folder / "pytorch_model.bin", 0.5)
    words = [f"model.path={folder}", f"task.path={rte_folder}", f"results_dir={tmp_path / 'results'}"]
    code, _, error = run_main(*SHORT, *words)
    assert code == 2 and len(error.strip().splitlines()) <= 2


def test_weights_that_are_not_a_dictionary_are_refused(hub_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")
    assert "the weights cannot be loaded" in refusal(folder)


@pytest.mark.parametrize("lost", ["model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_an_incomplete_set_of_shards_is_refused(lost: str, hub_folder: Path, tmp_path: Path) -> None:
    folder = to_safetensors(copy_folder(hub_folder, tmp_path / "copy"), shards=3)
    (folder / lost).unlink()
    assert "the weights cannot be loaded" in refusal(folder)


def test_a_checkpoint_that_lacks_part_of_the_body_is_refused(hub_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    weights = read_weights(folder)
    del weights[KEY]
    torch.save(weights, folder / "pytorch_model.bin")
    assert f"the checkpoint lacks {KEY}" in refusal(folder)
    del weights["deberta.encoder.rel_embeddings.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    assert "lacks 2 tensors of the body" in refusal(folder)


def test_a_body_of_another_shape_is_refused_with_both_shapes(hub_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    weights = read_weights(folder)
    weights[KEY] = weights[KEY][:, :8].clone()
    torch.save(weights, folder / "pytorch_model.bin")
    assert f"{KEY} is [16, 8] in the checkpoint, [16, 16] by config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "allowed is a folder with config.json"),
        ("", "config.json cannot be read"),
        ('{"model_type": ', "config.json cannot be read"),
        ("[1]", "config.json cannot be read"),
        ("{}", "has no model_type"),
        ('{"model_type": "robberta"}', "model_type robberta is unknown; did you mean roberta?"),
        ('{"model_type": ["deberta-v2"]}', "is unknown"),
        ('{"model_type": "deberta-v2"}', "num_hidden_layers in config.json is None"),
        ('{"model_type": "deberta-v2", "num_hidden_layers": "two"}', "num_hidden_layers in config.json is two"),
        (json.dumps(CONFIG | {"hidden_size": 17}), "not a multiple of the number of attention heads"),
        (json.dumps(CONFIG | {"vocab_size": 8}), "deberta.embeddings.word_embeddings.weight is"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(
    content: str | None, expected: str, hub_folder: Path, tmp_path: Path
) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert expected in refusal(folder)


def test_a_config_in_another_encoding_is_refused(hub_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    (folder / "config.json").write_bytes(json.dumps(CONFIG).encode("utf-16"))
    assert "config.json cannot be read" in refusal(folder)


def test_a_folder_without_weights_is_refused(hub_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    (folder / "pytorch_model.bin").unlink()
    assert "no weights: allowed is a folder with model.safetensors or pytorch_model.bin" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("spm.model", None, "there is no tokenizer"),
        ("spm.model", b"", "the tokenizer cannot be loaded"),
        ("spm.model", b"nonsense", "the tokenizer cannot be loaded"),
        ("tokenizer_config.json", b"{", "the tokenizer cannot be loaded"),
    ],
)
def test_a_folder_without_a_readable_tokenizer_is_refused(
    file: str, content: bytes | None, expected: str, hub_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    assert expected in refusal(folder)
    assert capfd.readouterr().err == ""


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(hub_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(hub_folder, tmp_path / "copy")
    words = "deberta.embeddings.word_embeddings.weight"
    torch.save(hub_weights() | {words: hub_weights()[words][:VOCABULARY].clone()}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": VOCABULARY}))
    assert f"the tokenizer has {VOCABULARY + 1} tokens, the model {VOCABULARY}" in refusal(folder)


def test_other_weights_under_a_pinned_name_are_refused_unless_the_pin_is_lifted(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    model = compose("model=minilm", f"model.path={tmp_path}", "k=1").model
    with pytest.raises(ConfigError) as caught:
        locate(model)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"model.path={tmp_path}: model.safetensors has sha256 ")
    assert "53aa51172d14" in lines[0] and "model.sha256=null" in lines[1]
    lifted = compose("model=minilm", f"model.path={tmp_path}", "model.sha256=null", "k=1").model
    assert locate(lifted).location == str(tmp_path)


def test_a_file_that_cannot_be_looked_at_is_not_taken_for_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers leaves out `tokenizer_config.json` then, and the run would have other numbers."""
    folder = tmp_path / "tokenizer"
    build_tokenizer().save_pretrained(str(folder))
    look = os.stat

    def fail(path: Any, *given: Any, **named: Any) -> os.stat_result:
        if str(path).endswith("tokenizer_config.json"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return look(path, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        AutoTokenizer.from_pretrained(folder)  # no word of it
        with strict_lookups(), pytest.raises(OSError, match="Input/output error"):
            AutoTokenizer.from_pretrained(folder)
    with strict_lookups():
        AutoTokenizer.from_pretrained(folder)
        assert not os.path.exists(tmp_path / "none") and not os.path.isfile(folder) and os.path.isdir(folder)
