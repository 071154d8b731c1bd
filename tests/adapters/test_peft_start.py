"""Runs that start from adapters in PEFT's format, and folders that are refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.conftest import TINY, compose
from tests.support.bombs import Bomb
from tests.support.conf_files import FITTING, METHODS
from wlora.adapters.peft_format import Factors, fingerprint, read_adapter
from wlora.errors import ConfigError
from wlora.experiment import build
from wlora.experiment import run as experiment
from wlora.methods import registry as methods
from wlora.methods.base import Method
from wlora.models.loading import load_model
from wlora.models.source import locate
from wlora.models.tokenizer import load_tokenizer
from wlora.storage.records import RecordStore

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The results of a run whose adapters have ranks of their own, and its `run_id`."""
    results = tmp_path_factory.mktemp("first")
    record = experiment.run(
        compose(*TINY, "method=increlora", "rank=4", "lr=1e-2", "precision=fp32", f"results_dir={results}")
    )
    assert len({adapter["rank"] for adapter in record.adapters}) > 1
    return results, str(record.run_id)


@pytest.fixture
def trained(first: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the adapters of `first`, which a test may spoil, in its results folder."""
    results, run_id = first
    return shutil.copytree(results, tmp_path / "first") / "adapters" / run_id


def start(folder: Path, *words: str) -> list[str]:
    return [f"adapter.path={folder}", "precision=fp32", *words]


@pytest.mark.parametrize("method", ["lora", "wlora", "wlora_plus", "rlora", "alora", "lora_drop"])
def test_a_run_starts_from_the_adapters_of_another(
    method: str, trained: Path, run_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attached: dict[str, Factors] = {}
    attach = build._attach

    def watch(model: Any, method: Method, config: Any) -> Any:
        head = attach(model, method, config)
        attached.update({name: Factors(*(m.clone() for m in a.factors()), a.scale) for name, a in method.adapters.items()})
        return head

    monkeypatch.setattr(build, "_attach", watch)
    record = run_tiny(f"method={method}", "k=1", "rank=4", *start(trained))
    given = read_adapter(str(trained)).adapters
    assert record.status == "success" and set(attached) <= set(given)
    assert method == "rlora" or set(attached) == set(given)
    for name, (A, B, scale) in attached.items():
        assert torch.equal(A, given[name].A) and torch.equal(B, given[name].B) and scale == pytest.approx(given[name].scale)
    assert all(float(B.abs().max()) > 0 for _, B, _ in attached.values())


def test_with_its_head_a_run_begins_where_the_other_ended(trained: Path, run_tiny: Callable[..., Any]) -> None:
    first = RecordStore(trained.parent.parent).read(trained.name)
    assert first is not None
    still = ["method=lora", "lr=1e-9", "train.max_steps=1", *start(trained)]
    with_head, fresh = run_tiny(*still, "adapter.head=true"), run_tiny(*still)
    assert with_head.metrics["loss"] == pytest.approx(first.metrics["loss"], abs=1e-5)
    assert abs(fresh.metrics["loss"] - first.metrics["loss"]) > 1e-3
    assert with_head.run_id != fresh.run_id


def test_the_content_of_the_start_is_part_of_the_identity_and_its_place_is_not(trained: Path, tmp_path: Path) -> None:
    def identity(*words: str) -> str:
        from wlora.config.identity import run_id, scientific_fields

        config = compose(*TINY, "method=lora", *words)
        return run_id(scientific_fields(config, task_data="d", model_data=None, precision="fp32"))

    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    plain, first = identity(), identity(f"adapter.path={trained}")
    assert first == identity(f"adapter.path={moved}") != plain
    (moved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    assert identity(f"adapter.path={moved}") not in (plain, first)
    with pytest.raises(ConfigError, match="adapter.fingerprint"):
        compose(*TINY, f"adapter.path={moved}", f"adapter.fingerprint={fingerprint(str(trained))}")


def test_an_adapter_that_peft_itself_made_and_trained_elsewhere(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    config = compose(*TINY)
    tokenizer = load_tokenizer(config.model, locate(config.model))
    base = load_model(config.model, locate(config.model), tokenizer, head="sequence_classification", num_labels=3, seed=0)
    settings = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], rank_pattern={"layer.1.*query": 5})
    get_peft_model(base, settings).save_pretrained(tmp_path / "theirs")  # type: ignore[arg-type]
    record = run_tiny("method=lora", *start(tmp_path / "theirs"))
    ranks = {adapter["name"].removeprefix("bert.encoder.layer."): adapter["rank"] for adapter in record.adapters}
    short = "attention.self"
    assert ranks == {f"0.{short}.query": 3, f"0.{short}.value": 3, f"1.{short}.query": 5, f"1.{short}.value": 3}


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        experiment.run(compose(*TINY, "precision=fp32", *words))
    assert str(caught.value).count("\n") < 2
    return str(caught.value)


def test_what_does_not_fit_is_refused(trained: Path, tmp_path: Path) -> None:
    here = [f"results_dir={tmp_path / 'r'}", f"adapter.path={trained}"]
    assert "method=adalora: its adapters have their own initialisation" in refused("method=adalora", *here)
    assert "has an adapter on bert.encoder" in refused("method=lora", "model=tiny_deberta", *here)
    wide = ["model.architecture.hidden_size=64"]
    assert "maps 32 to 32, the module 64 to 64" in refused("method=lora", *wide, *here)
    content = load_file(trained / "adapter_model.safetensors")
    del content["base_model.model.classifier.weight"]
    save_file(content, trained / "adapter_model.safetensors")
    assert "adapter.head=true: classifier.weight is missing" in refused("method=lora", "adapter.head=true", *here)
    assert not (tmp_path / "r" / "records").exists()


def test_the_methods_that_can_start_are_those_that_the_message_names() -> None:
    import inspect

    text = inspect.getsource(methods.build_method)
    able = []
    for name in METHODS:
        settings = compose(*TINY, f"method={name}", "rank=4", *FITTING.get(name, [])).method
        try:
            methods.build_method(settings, started=True)
            able.append(name)
        except ConfigError:
            continue
    named = text.split('"lora, ')[1].split('"')[0]
    assert able == sorted(["lora", *named.split(", ")])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("pickle", "adapter_model.bin is pickle and never read"),
        ("cut", "adapter_model.safetensors cannot be read"),
        ("empty", "adapter_model.safetensors cannot be read"),
        ("json", "adapter_config.json cannot be read"),
        ("list", "adapter_config.json cannot be read"),
        ("deep", "adapter_config.json cannot be read"),
        ("alpha", "lora_alpha is -1: allowed is a number above 0, at most 1e.09"),
        ("vast", "lora_alpha is 10000*: allowed is a number above 0"),
        ("pattern", "alpha_pattern is .*: allowed is names of modules"),
        ("for ever", "alpha_pattern is .*: allowed is names of modules"),
        ("modules", "modules_to_save is 5: allowed is a list of names"),
        ("rank", "r is 0: allowed is 1 to 65536"),
        ("no rank", "A and B of bert.* are incomplete, or their shapes do not match"),
        ("dora", "use_dora is True: allowed is False"),
        ("pissa", "init_lora_weights is pissa"),
        ("kind", "peft_type is VERA: allowed is LORA"),
        ("half", "A and B of bert.* are incomplete, or their shapes do not match"),
        ("strange", "is neither LoRA's A or B nor a tensor of a head"),
    ],
)
def test_a_broken_or_malicious_folder_is_refused(fault: str, message: str, trained: Path, tmp_path: Path) -> None:
    weights, file = trained / "adapter_model.safetensors", trained / "adapter_config.json"
    config, tensors = json.loads(file.read_text()), load_file(weights)
    first = next(key for key in tensors if "lora_A" in key)
    match fault:
        case "pickle":
            weights.unlink()
            (trained / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "pwned")))
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-50])
        case "empty":
            weights.write_bytes(b"")
        case "json":
            file.write_text("{")
        case "list":
            file.write_text("[]")
        case "alpha":
            file.write_text(json.dumps(config | {"lora_alpha": -1}))
        case "pattern":
            file.write_text(json.dumps(config | {"alpha_pattern": {"(": 1}}))
        case "for ever":
            file.write_text(json.dumps(config | {"alpha_pattern": {"(\\w*.)*(\\w*.)*(\\w*.)*x": 1}}))
        case "deep":
            file.write_text('{"r": ' + "[" * 10_000 + "]" * 10_000 + "}")
        case "vast":
            file.write_text(json.dumps(config | {"lora_alpha": 10**400}))
        case "modules":
            file.write_text(json.dumps(config | {"modules_to_save": 5}))
        case "rank":
            file.write_text(json.dumps(config | {"r": 0}))
        case "no rank":
            second = first.replace("lora_A", "lora_B")
            empty = {first: tensors[first][:0].clone(), second: tensors[second][:, :0].clone()}
            save_file(tensors | empty, weights)
        case "dora":
            file.write_text(json.dumps(config | {"use_dora": True}))
        case "pissa":
            file.write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
        case "kind":
            file.write_text(json.dumps(config | {"peft_type": "VERA"}))
        case "half":
            del tensors[first]
            save_file(tensors, weights)
        case "strange":
            save_file({**tensors, "base_model.model.bert.embeddings.weight": torch.ones(2)}, weights)
    told = refused("method=lora", f"adapter.path={trained}", f"results_dir={tmp_path / 'r'}")
    assert re.search(message, told), told
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "r").exists()
