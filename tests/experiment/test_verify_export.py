"""`wlora verify-export`: an export has the logits of its run, a changed one is found, and vLLM's refusals are told."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from wlora.adapters.peft_format import CONFIG, WEIGHTS
from wlora.cli.verify_export import main
from wlora.errors import ConfigError, RunFault
from wlora.experiment.export import export
from wlora.experiment.verify_export import verify

SHORT = ["task.max_train_rows=64", "task.max_eval_rows=8", "precision=fp32", "lr=1e-2", "targets=all"]
QUICK = ["task.max_train_rows=32", "train.max_steps=4"]
FAMILIES = {
    "bert": ["model=tiny_bert", "method=wlora_plus"],
    "gates": ["model=tiny_bert", "method=adalora"],
    "llama": ["model=tiny_llama", "method=wlora", "k=2"],
    "summaries": ["task=story_summary", "model=tiny_bart", "task.generation.max_new_tokens=4", "method=lora", *QUICK],
    "questions": ["task=story_qa", "method=lora", *QUICK],
    "dora": ["model=tiny_bert", "method=dora", *QUICK],
    "vera": ["model=tiny_bert", "method=vera", *QUICK],
}


def without_onnx(name: str) -> None:
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_has_the_logits_of_the_run(
    family: str, run_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", without_onnx)  # a test of its own
    record = run_tiny(*SHORT, *FAMILIES[family])
    there = f"results_dir={tmp_path}"
    formats = (["format=peft"], ["format=peft", "compact=true"], ["format=merged"])
    for number, words in enumerate(formats):
        lines = verify([str(export([record.run_id, there, f"to={tmp_path / str(number)}", *words])), there])
        told = {line.split()[0] for line in lines}
        assert told >= {"training", "merged", "vllm"} and ("peft" in told) == (words != ["format=merged"])


def test_uniform_exports_have_one_rank_and_one_scale(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    record = run_tiny(*SHORT, "method=wlora_plus", "rank=2", "k=5")
    there = f"results_dir={tmp_path}"
    ranks = [adapter["rank"] for adapter in record.adapters]
    assert len(set(ranks)) > 1
    compact, uniform = (export([record.run_id, there, f"to={tmp_path / str(c)}", f"compact={c}"]) for c in ("true", "false"))
    own, one = (json.loads((folder / CONFIG).read_text()) for folder in (compact, uniform))
    assert (
        own["rank_pattern"] and own["target_modules"] == one["target_modules"] and len(one["target_modules"]) == len(ranks)
    )
    assert (one["rank_pattern"], one["alpha_pattern"], one["r"], one["lora_alpha"]) == ({}, {}, max(ranks), max(ranks))
    assert one["modules_to_save"] == own["modules_to_save"] == ["bert.pooler", "classifier"]
    tensors = load_file(uniform / WEIGHTS)
    assert {len(tensor) for name, tensor in tensors.items() if ".lora_A." in name} == {max(ranks)}
    content = json.loads((uniform / "config.json").read_text())
    assert content["id2label"]["1"] == "neutral" and content["problem_type"] == "single_label_classification"


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")), reason="needs wlora[onnx]"
)
@pytest.mark.slow
def test_onnx_runtime_gives_the_logits_too(
    run_tiny: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = run_tiny(*SHORT, "method=wlora", "k=3")
    there = f"results_dir={tmp_path}"
    lines = verify([str(export([record.run_id, there])), there])
    assert any(re.fullmatch(r"onnx      differs by at most \S+", line) for line in lines)
    assert "torchvision" not in (said := capfd.readouterr().err) and "Evaluation failed" not in said


def test_a_changed_export_is_found(run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run_tiny(*SHORT, "method=lora")
    there = f"results_dir={tmp_path}"
    folder = export([record.run_id, there])
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("classifier.bias"))
    save_file(tensors | {name: tensors[name] + 0.01}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RunFault, match="peft      differs by at most 1.0e-02\nmore than 0.0001 of the largest"):
        verify([str(folder), there])
    with pytest.raises(SystemExit) as end:
        main([str(folder), there])
    assert end.value.code == 1 and "the export differs from the trained model" in capsys.readouterr().err


def test_what_vllm_refuses_is_told_with_the_way_out(
    run_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", without_onnx)
    there = f"results_dir={tmp_path}"

    def told(*words: str) -> str:
        record = run_tiny(*SHORT, *QUICK, *words)
        return "\n".join(line for line in verify([str(export([record.run_id, there])), there]) if line.startswith("vllm"))

    pooler = told("method=lora")
    assert "does not support modules_to_save=bert.pooler, only classifier and score\nway out: serve" in pooler
    assert "supports all settings" in told("model=tiny_llama", "method=lora")
    monkeypatch.setattr("wlora.experiment.verify_export._VLLM_RANK", 4)
    assert "does not support rank 8 by default\nway out: --max-lora-rank 8" in told("model=tiny_llama", "method=lora")
    assert "only plain LoRA" in told("method=vera")


def test_a_folder_that_is_no_export_is_refused_in_a_line(tmp_path: Path) -> None:
    for words, expected in (
        ([], "DIR is missing: allowed is one folder"),
        ([str(tmp_path)], "has no model card that names a run"),
        ([str(tmp_path), "tol=1"], "tol is unknown"),
    ):
        with pytest.raises(ConfigError, match=expected) as caught:
            verify(words)
        assert str(caught.value).count("\n") < 2
