"""Tiny random models of 24 families: discovered, trained, cut, exported and read again by PEFT, with the same logits.

Each is a folder (`model.path=DIR`) and a repository of the hub (`model=hub model.hub_id=...`, from a filled cache).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from torch import Tensor

from tests.conftest import compose
from tests.support.model_folders import FAMILIES, GENERATORS, build_model_folder, fill_cache
from wlora.adapters.layer import AdaptedLinear
from wlora.experiment import run as experiment
from wlora.experiment.export import export
from wlora.models.heads import AUTO, head_modules
from wlora.storage.records import Record
from wlora.training.trainer import Trainer

TEXTS = ["Anna went to the library.", "Ben took the lamp to the garden. Anna is in the school."]
# Of the default tier: another encoder, fused Conv1D, shared layers, an encoder-decoder.
QUICK = ("roberta", "gpt2", "albert", "t5")
EACH = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
KEPT = 3


def words_for(family: str) -> list[str]:
    """Return the run's task and method: WeightLoRA on all linears, which keeps three after six of twelve steps."""
    task = ["task=story_nli"]
    if family in GENERATORS:
        task = ["task=story_summary", "task.generation.max_new_tokens=4"]
    sizes = ["task.max_train_rows=64", "task.max_eval_rows=8", "task.batch_size=4", "train.max_steps=12"]
    return [*task, *sizes, "method=wlora", f"k={KEPT}", "targets=all", "lr=1e-2", "method.select_steps=6", "precision=fp32"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Record, Trainer]]:
    """Return a function that runs a configuration and returns its record and its trainer."""
    trainers: list[Trainer] = []
    finish = experiment.finish

    def catch(job: experiment.Job, trainer: Trainer, result: Any) -> None:
        trainers.append(trainer)
        finish(job, trainer, result)

    monkeypatch.setattr(experiment, "finish", catch)

    def run(*words: str, results: str = "results") -> tuple[Record, Trainer]:
        record = experiment.run(compose(*words, f"results_dir={tmp_path / results}"))
        return record, trainers[-1]

    return run


def logits(model: Any, tokenizer: Any) -> Tensor:
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="pt").items())
    if model.config.is_encoder_decoder and not hasattr(model, "classification_head"):
        inputs["labels"] = inputs["input_ids"]
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    return found


def read_plain(family: str, folder: Path, pad: int) -> Any:
    """Load a folder as a user of transformers does, with three outputs and the padding token of the run."""
    kind = "seq2seq" if family in GENERATORS else "sequence_classification"
    model = AUTO[kind].from_pretrained(folder, **({} if family in GENERATORS else {"num_labels": 3}))
    model.config.pad_token_id = pad
    return model


@pytest.mark.parametrize("family", EACH)
def test_a_model_trains_is_cut_and_is_read_again_by_peft_with_the_same_logits(
    family: str, trained: Callable[..., tuple[Record, Trainer]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_model_folder(family, tmp_path / f"tiny-{family}")
    words = words_for(family)
    record, trainer = trained(*words, f"model.path={folder}")
    model, tokenizer = trainer.bare_model, trainer.tokenizer
    adapted = [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    assert len(adapted) == KEPT and [adapter["name"] for adapter in record.adapters] == adapted
    assert all(adapter.B.abs().max() > 0 for adapter in trainer.method.adapters.values()), "no adapter has trained"
    assert all(torch.isfinite(p).all() for module in head_modules(model).values() for p in module.parameters())
    expected = logits(model, tokenizer)
    with trainer.method.adapters.only([]):
        assert float((logits(model, tokenizer) - expected).abs().max()) > 1e-4, "the adapters do nothing"

    there = f"results_dir={tmp_path / 'results'}"
    peft, merged = (export([record.run_id, f"format={kind}", there]) for kind in ("peft", "merged"))
    again = PeftModel.from_pretrained(read_plain(family, folder, tokenizer.pad_token_id), str(peft))
    torch.testing.assert_close(logits(again, tokenizer), expected, rtol=1e-4, atol=1e-5)
    whole = read_plain(family, merged, tokenizer.pad_token_id)
    torch.testing.assert_close(logits(whole, tokenizer), expected, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # `offline=true` sets these; the test restores them.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE"):
        monkeypatch.setenv(name, "")
    fill_cache(folder, tmp_path, f"tiny/{family}")
    of_hub, _ = trained(*words, "model=hub", f"model.hub_id=tiny/{family}", "offline=true", results="of_hub")
    assert constants.HF_HUB_OFFLINE, "the libraries may use the network, and wait for it if it is down"
    assert of_hub.metrics == record.metrics and of_hub.adapters == record.adapters
    assert of_hub.config["model"]["name"] == family and of_hub.run_id != record.run_id
