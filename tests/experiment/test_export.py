"""Exports: what PEFT and transformers load from them gives the logits of the run, and the card tells the record's facts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.support.bart_folder import build_bart_folder
from tests.support.outputs import TEXTS, logits
from wlora.adapters.peft_format import CONFIG, WEIGHTS, fingerprint
from wlora.cli.export import main
from wlora.config.schema import restore_config
from wlora.errors import ConfigError
from wlora.experiment.export import export
from wlora.models.loading import load_model
from wlora.models.source import locate
from wlora.models.tokenizer import load_tokenizer
from wlora.storage.records import RecordStore

WORDS = ["method=wlora", "k=3", "targets=all", "lr=1e-2", "precision=fp32"]


@pytest.fixture
def saved(run_tiny: Callable[..., Any], tmp_path: Path) -> tuple[Any, Any, Any]:
    """A run, and its model as `train.save_model` wrote it, with the tokenizer."""
    record = run_tiny(*WORDS, "train.save_model=true")
    folder = tmp_path / "models" / record.run_id
    return record, AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_both_formats_give_the_logits_of_the_run(saved: tuple[Any, Any, Any], tmp_path: Path) -> None:
    record, model, tokenizer = saved
    expected = logits(model, tokenizer)
    peft, merged = (export([record.run_id, f"format={kind}", f"results_dir={tmp_path}"]) for kind in ("peft", "merged"))
    config = restore_config(record.config)
    own = load_tokenizer(config.model, locate(config.model))
    base = load_model(config.model, locate(config.model), own, head="sequence_classification", num_labels=3, seed=5)
    plain = logits(base, tokenizer)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, peft), tokenizer), expected, atol=1e-5)
    whole = AutoModelForSequenceClassification.from_pretrained(merged)
    assert torch.allclose(logits(whole, AutoTokenizer.from_pretrained(merged)), expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert whole.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert (whole.config.label2id["neutral"], whole.config.problem_type) == (1, "single_label_classification")
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in peft.iterdir()} == {"README.md", "config.json", *tokenizer_files, CONFIG, WEIGHTS}
    assert AutoTokenizer.from_pretrained(peft)(TEXTS) == tokenizer(TEXTS)
    assert [folder.name for folder in (tmp_path / "exports").iterdir() if folder.name.startswith(".")] == []


def test_adapters_are_exported_without_their_tokenizer_where_the_base_is_gone(
    run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bart = build_bart_folder(tmp_path / "bart")
    record = run_tiny("model=bart_large", f"model.path={bart}", "task.max_length=64", "method=lora", "train.max_steps=1")
    with_tokenizer = export([record.run_id, f"results_dir={tmp_path}", f"to={tmp_path / 'with'}"])
    moved = bart.rename(tmp_path / "moved")
    without = export([record.run_id, f"results_dir={tmp_path}", f"to={tmp_path / 'without'}"])
    assert capsys.readouterr().err.startswith(f"notice: the tokenizer is not exported: model.path={bart}: ")
    assert {file.name for file in without.iterdir()} == {"README.md", CONFIG, WEIGHTS}
    assert (with_tokenizer / "tokenizer.json").is_file() and fingerprint(str(with_tokenizer)) == fingerprint(str(without))
    again = export([record.run_id, f"results_dir={tmp_path}", f"to={tmp_path / 'again'}", f"model.path={moved}"])
    assert (again / "tokenizer.json").read_bytes() == (with_tokenizer / "tokenizer.json").read_bytes()


FAMILIES = {
    "bert": ["model=tiny_bert"],
    "deberta": ["model=tiny_deberta"],
    "llama": ["model=tiny_llama"],
    "bart": ["model=tiny_bart"],
    "questions": ["task=story_qa"],
    "summaries": ["task=story_summary", "model=tiny_bart", "task.generation.max_new_tokens=4"],
}


@pytest.mark.parametrize(
    ("name", "family"), [*(("vera", family) for family in FAMILIES), ("vb_lora", "bert"), ("dora", "bert")]
)
def test_what_peft_has_made_is_merged_into_a_plain_model(
    name: str, family: str, run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    small = [
        "task.max_train_rows=32",
        "task.max_eval_rows=8",
        "train.max_steps=4",
        "train.save_model=true",
        "precision=fp32",
    ]
    record = run_tiny(f"method={name}", *FAMILIES[family], *small)
    merged, saved = export([record.run_id, "format=merged", f"results_dir={tmp_path}"]), tmp_path / "models" / record.run_id
    found, expected = (load_file(folder / "model.safetensors") for folder in (merged, saved))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=1e-6), key
    told, wanted = (json.loads((folder / "config.json").read_text()) for folder in (merged, saved))
    assert told == wanted


def test_an_export_is_a_start(saved: tuple[Any, Any, Any], run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    record, _, _ = saved
    folder = export([record.run_id, f"results_dir={tmp_path}", f"to={tmp_path / 'shared'}"])
    assert folder == tmp_path / "shared"
    still = ["method=lora", "targets=all", "precision=fp32", "lr=1e-9", "train.max_steps=1", "adapter.head=true"]
    again = run_tiny(*still, f"adapter.path={folder}")
    assert again.metrics["loss"] == pytest.approx(record.metrics["loss"], abs=1e-5)
    assert [adapter["name"] for adapter in again.adapters] == [adapter["name"] for adapter in record.adapters]


def test_the_card_tells_the_facts_of_the_record(saved: tuple[Any, Any, Any], tmp_path: Path) -> None:
    record, _, _ = saved
    text = (export([record.run_id, f"results_dir={tmp_path}"]) / "README.md").read_text()
    front = dict(line.split(": ", 1) for line in text.split("---\n")[1].splitlines())
    assert json.loads(front["library_name"]) == "peft" and json.loads(front["tags"]) == ["wlora", "lora"]
    assert f"| **accuracy** | {record.metrics['accuracy']:.4f} |" in text and "On the dev set" in text
    for adapter in record.adapters:
        assert f"| `{adapter['name']}` | {adapter['omega']:.4f} | {adapter['rank']} |" in text
    assert f"| adapter_final | {record.parameters['adapter_final']} |" in text and record.run_id in text
    assert "| learning rate | 0.01 |" in text and "| method.k | 3 |" in text and str(tmp_path) not in text
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    compile(code, "card", "exec")


def test_generation_settings_of_the_run_go_into_a_merged_model(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    bart = build_bart_folder(tmp_path / "bart")  # its own settings: four beams, early stopping
    local = ["task=story_summary", "model=bart_large", f"model.path={bart}", "task.max_length=64", "method=lora"]
    sizes = ["task.max_train_rows=16", "task.max_eval_rows=4", "train.max_steps=1"]
    record = run_tiny(*local, *sizes, "task.generation.num_beams=1", "task.generation.max_new_tokens=5")
    folder = export([record.run_id, "format=merged", f"results_dir={tmp_path}"])
    kept = AutoModelForSeq2SeqLM.from_pretrained(folder).generation_config
    assert (kept.num_beams, kept.max_new_tokens, kept.early_stopping) == (1, 5, True)
    # The base may have moved, and may not be another one.
    moved = bart.rename(tmp_path / "moved")
    again = export([record.run_id, "format=merged", f"results_dir={tmp_path}", f"model.path={moved}"])
    assert again == folder
    (moved / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model.path=.*: its content is .*, the run's base was"):
        export([record.run_id, "format=merged", f"results_dir={tmp_path}", f"model.path={moved}"])


def test_what_cannot_be_exported_is_refused_in_a_line_or_two(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    there = f"results_dir={tmp_path}"

    def refused(*words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            export(words)
        assert str(caught.value).count("\n") < 2
        return str(caught.value)

    record = run_tiny("method=lora")
    assert f"did you mean {record.run_id}?" in refused(record.run_id[:-1] + "x", there)
    assert "format=onnx: allowed is peft | merged" in refused(record.run_id, "format=onnx", there)
    assert "formt is unknown; did you mean format?" in refused(record.run_id, "formt=peft", there)
    assert "allowed is one RUN_ID" in refused(there) and "allowed is one RUN_ID" in refused("a", "b", there)
    assert "allowed is a folder that does not exist yet" in refused(record.run_id, there, f"to={tmp_path}")
    weights = tmp_path / "adapters" / record.run_id / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "is not what the run wrote" in refused(record.run_id, there)
    content[-1] ^= 1
    weights.write_bytes(content)
    settings = weights.with_name(CONFIG)
    own = settings.read_text()
    settings.write_text(own.replace('"lora_alpha": ', '"lora_alpha": 9'))
    assert f"{CONFIG} is not what the run wrote" in refused(record.run_id, there)
    settings.write_text(own)
    weights.unlink()
    assert f"from={record.run_id}" in refused(record.run_id, there)
    assert "method=full has saved no adapters" in refused(run_tiny("method=full").run_id, there)
    store = RecordStore(tmp_path)
    record.status = "failed"
    store.write(record)
    assert "its status is failed" in refused(record.run_id, there)
    assert not (tmp_path / "exports").exists()


def test_a_record_that_tells_of_the_weights_alone_is_still_exported(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    record = run_tiny("method=lora")
    del record.model["adapter_config"]
    RecordStore(tmp_path).write(record)
    assert (export([record.run_id, f"results_dir={tmp_path}"]) / CONFIG).is_file()


def test_packed_weights_are_not_merged(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    record = run_tiny("method=lora")
    record.config["model"]["quantization"] = "nf4"
    RecordStore(tmp_path).write(record)
    with pytest.raises(
        ConfigError, match="adapters are not merged into weights from quantised ones: allowed is format=peft"
    ):
        export([record.run_id, "format=merged", f"results_dir={tmp_path}"])


def test_adapters_are_kept_unless_told_otherwise_and_a_full_disk_costs_no_run(
    run_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run_tiny("method=lora", "train.save_adapter=false")
    assert not (tmp_path / "adapters").exists() and "adapter" not in plain.model

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wlora.experiment.saving.write_adapter", full)
    record = run_tiny("method=lora", results=tmp_path / "full")
    assert record.status == "success" and record.model["adapter"] is None and record.run_id == plain.run_id
    assert "cannot be written (No space left on device)" in capsys.readouterr().out
    assert list((tmp_path / "full" / "adapters").iterdir()) == []


def test_the_command_line(run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run_tiny("method=lora")
    main([record.run_id, f"results_dir={tmp_path}"])
    assert capsys.readouterr().out.strip().endswith(f"exports/{record.run_id}-peft")
    for words, code in ((["--help"], 0), ([], 2), (["nothing", f"results_dir={tmp_path}"], 2)):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == code
    assert "no record of that name among the 1" in capsys.readouterr().err
