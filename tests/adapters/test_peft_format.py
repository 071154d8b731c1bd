"""Adapters in PEFT's format: what the library makes of them gives the run's own logits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import TINY, compose
from tests.support.conf_files import FITTING, METHODS, RELEASED, whole_runs
from tests.support.outputs import TEXTS, logits
from wlora.adapters.layer import LowRankAdapter
from wlora.adapters.peft_format import Factors, _compile, describe_lora
from wlora.adapters.variants import BlockDiagonalAdapter, FramedAdapter, GrowingAdapter, TiedAdapter
from wlora.experiment import outcome, saving
from wlora.experiment import run as experiment
from wlora.methods.base import Method
from wlora.models.loading import load_model
from wlora.models.source import locate
from wlora.models.tokenizer import load_tokenizer
from wlora.tasks.base import build_task

pytestmark = pytest.mark.integration

SPECIAL = {
    **FITTING,
    "single": ["method.index=4"],
    "lora_drop": ["method.share=true"],
    "wlora": ["k=3"],
    "vb_lora": ["method.vector_length=8"],
}
ADAPTED = sorted({*METHODS} - {"full", "probe"})


def load_base(record: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a run's base with a head of another seed."""
    config = experiment_config(record)
    source, task = locate(config.model), build_task(config.task)
    tokenizer = load_tokenizer(config.model, source)
    model = load_model(config.model, source, tokenizer, head=task.head, num_labels=task.num_labels, seed=99)
    return model, tokenizer


def experiment_config(record: Any) -> Any:
    from wlora.config.schema import restore_config

    return restore_config(record.config)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Catch a run's model when its adapters are saved: stronger adapters, so that they matter, and the logits with them."""
    found: dict[str, Any] = {}

    def save(model: PreTrainedModel, method: Method, folder: Path, **given: Any) -> dict[str, str]:
        tokenizer = found["tokenizer"] = load_tokenizer(found["config"].model, locate(found["config"].model))
        torch.manual_seed(0)
        before = logits(model, tokenizer)
        adapted = [p for adapter in method.attached().values() for p in adapter.parameters() if p.dim()]
        for parameter in dict.fromkeys(adapted):  # in an order of its own, so that every run draws the same
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        found["logits"] = logits(model, tokenizer)
        found["moved"] = float((found["logits"] - before).abs().max())
        return saving.save_adapter(model, method, folder, **given)

    monkeypatch.setattr(outcome, "save_adapter", save)
    return found


def run(seen: dict[str, Any], results: Path, *words: str) -> tuple[Any, Path]:
    seen["config"] = config = compose(*TINY, "precision=fp32", *words, f"results_dir={results}")
    record = experiment.run(config)
    return record, results / "adapters" / record.run_id


@pytest.mark.parametrize("method", whole_runs([*ADAPTED, *RELEASED]))
def test_peft_gives_the_logits_of_every_method(method: str, seen: dict[str, Any], tmp_path: Path) -> None:
    words = [*f"method={method}".split(), "targets=all", "rank=4", "train.max_steps=20", *SPECIAL.get(method.split()[0], [])]
    record, folder = run(seen, tmp_path, *words)
    base, tokenizer = load_base(record)
    plain = logits(base, tokenizer)
    loaded = PeftModel.from_pretrained(base, folder)
    assert torch.allclose(logits(loaded, tokenizer), seen["logits"], atol=1e-5)
    assert float((plain - seen["logits"]).abs().max()) > 1e-3 and seen["moved"] > 1e-4, "adapters and head took part"


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_deberta", "tiny_bart", "tiny_llama"])
@pytest.mark.parametrize("method", ["wlora_plus", "increlora"])
def test_peft_gives_the_logits_of_every_family(model: str, method: str, seen: dict[str, Any], tmp_path: Path) -> None:
    words = [f"model={model}", f"method={method}", "targets=all", "rank=4", "train.max_steps=20"]
    record, folder = run(seen, tmp_path, *words)
    described = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(described["target_modules"]) == sorted(adapter["name"] for adapter in record.adapters)
    ranks = {name: described["rank_pattern"].get(name, described["r"]) for name in described["target_modules"]}
    assert ranks == {adapter["name"]: adapter["rank"] for adapter in record.adapters}
    base, tokenizer = load_base(record)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, folder), tokenizer), seen["logits"], atol=1e-5)
    assert seen["moved"] > 2e-5, "more than twice the tolerance above"


@pytest.mark.parametrize(
    "words",
    [
        ["task=story_summary", "model=tiny_bart", "targets=all", "task.generation.max_new_tokens=12"],
        ["task=story_qa", "model=tiny_bert"],
        ["task=story_qa", "model=tiny_deberta"],
    ],
)
def test_peft_gives_the_logits_of_the_other_heads(words: list[str], tmp_path: Path) -> None:
    words = [
        *words,
        "method=wlora",
        "k=3",
        "lr=1e-2",
        "train.max_steps=16",
        "task.max_train_rows=64",
        "task.max_eval_rows=8",
    ]
    kept: dict[str, Any] = {}
    config = compose(*TINY, "precision=fp32", *words, f"results_dir={tmp_path}")
    config.train.save_model = True
    record = experiment.run(config)
    base, tokenizer = load_base(record)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    merged = type(base).from_pretrained(tmp_path / "models" / record.run_id)
    plain = base.eval()(**inputs)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapters" / record.run_id)
    for key in ("logits", "start_logits", "end_logits"):
        if key in plain:
            kept[key] = loaded.eval()(**inputs)[key]
            assert torch.allclose(kept[key], merged.eval()(**inputs)[key], atol=1e-5)
            assert not torch.allclose(kept[key], plain[key], atol=1e-3)
    assert kept


def strong(adapter: LowRankAdapter) -> LowRankAdapter:
    for parameter in adapter.parameters():
        parameter.data = torch.randn_like(parameter)
    return adapter


def variants() -> list[LowRankAdapter]:
    growing = GrowingAdapter(8, 12, rank=1, std=0.1, scale=2.0)
    growing.add_reserve(2, gate=1e-5, generator=torch.Generator())
    gated = LowRankAdapter(8, 12, rank=3, scale=2.0, omega=0.5)
    gated.gates = nn.Parameter(torch.ones(3))
    framed = FramedAdapter(8, 12, frame=4, rank=2, scale=2.0)
    framed.outer_A, framed.outer_B = torch.randn(4, 8), torch.randn(12, 4)
    return [
        gated,
        growing,
        framed,
        BlockDiagonalAdapter(8, 12, blocks=4, rank=2, scale=2.0),
        TiedAdapter(8, 12, rank=3, scale=2.0),
    ]


@pytest.mark.parametrize("index", range(5))
def test_factors_are_those_of_a_plain_adapter_of_the_same_function(index: int) -> None:
    torch.manual_seed(index)
    adapter = strong(variants()[index])
    if adapter.omega is not None:
        adapter.omega.data.fill_(0.7)
    A, B = adapter.factors()
    x = torch.randn(5, 8)
    expected = adapter(x).detach()
    assert torch.allclose(x @ A.T @ B.T * adapter.scale, expected, atol=1e-4)
    assert torch.allclose(x @ adapter.delta_weight().T, expected, atol=1e-4)
    assert A.shape[0] == B.shape[1] and float(expected.abs().max()) > 0.1


def test_ranks_and_alphas_that_differ_stand_in_patterns() -> None:
    def factors(rank: int, scale: float) -> Factors:
        return Factors(torch.ones(rank, 4), torch.ones(6, rank), scale)

    made = {"a.x": factors(2, 4.0), "a.y": factors(2, 4.0), "b.x": factors(3, 4.0), "c": factors(2, 0.5)}
    config, tensors = describe_lora(made, dropout=0.1)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 8.0, 0.1)
    assert config["rank_pattern"] == {"b.x": 3} and config["alpha_pattern"] == {"b.x": 12.0, "c": 1.0}
    assert tensors["base_model.model.b.x.lora_B.weight"].shape == (6, 3)


@pytest.mark.parametrize(
    "pattern", ["query", "layer.1.*query", "^bert.layer.1.query", "^layer.1.query", r"r\.1\.query", "1.*"]
)
def test_a_pattern_names_the_modules_that_peft_takes_it_to_name(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    for module in (
        "bert.layer.1.query",
        "bert.layer.11.query",
        "bert.layer.1.query_proj",
        "layer.1.query",
        "bert.layer-1-query",
    ):
        theirs = get_pattern_key([pattern], module) == pattern and re.match(rf"(.*\.)?({pattern})$", module) is not None
        assert (_compile(pattern).match(module) is not None) == theirs, module


def test_layer_1_is_not_taken_for_layer_11(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))

    made = {f"layer.{i}": Factors(torch.ones(1 + i % 3, 4), torch.ones(4, 1 + i % 3), float(i + 1)) for i in range(12)}
    config, _ = describe_lora(made, dropout=0.0)
    peft = get_peft_model(Net(), LoraConfig(**config))  # type: ignore[arg-type]
    for name, (A, _, scale) in made.items():
        layer = peft.base_model.model.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (len(A), pytest.approx(scale))  # type: ignore[index]
