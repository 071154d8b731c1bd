"""Adapters in PEFT's format: what the library makes of them gives the run's own logits, and runs start from them."""

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
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import TINY, compose
from wlora.adapters.layer import LowRankAdapter
from wlora.adapters.peft_format import Factors, _compile, describe_lora, fingerprint, read_adapter
from wlora.adapters.variants import BlockDiagonalAdapter, FramedAdapter, GrowingAdapter, TiedAdapter
from wlora.config.schema import config_folder
from wlora.errors import ConfigError
from wlora.experiment import build, outcome, saving
from wlora.experiment import run as experiment
from wlora.methods import registry as methods
from wlora.methods.base import Method
from wlora.models.loading import load_model, load_tokenizer
from wlora.models.source import locate
from wlora.storage.records import RecordStore
from wlora.tasks.base import build_task

TEXTS = ["Anna went to the library.", "Ben took the lamp to the garden. Anna is in the school."]
SPECIAL = {
    "nora": ["method.outer_rank=16"],
    "single": ["method.index=4"],
    "lora_drop": ["method.share=true"],
    "wlora": ["k=3"],
    "vb_lora": ["method.vector_length=8"],
}
METHODS = sorted({path.stem for path in (config_folder() / "method").glob("*.yaml")} - {"full", "probe"})


def logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the logits of two texts in evaluation mode."""
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs.pop("token_type_ids", None)
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    return found


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


@pytest.mark.parametrize(
    ("name", "compat"), [*((name, "paper") for name in METHODS), ("wlora", "release"), ("wlora_plus", "release")]
)
def test_peft_gives_the_logits_of_every_method(name: str, compat: str, seen: dict[str, Any], tmp_path: Path) -> None:
    words = [f"method={name}", f"compat={compat}", "targets=all", "rank=4", "train.max_steps=20", *SPECIAL.get(name, [])]
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


@pytest.fixture
def trained(run_tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """The folder of a run whose adapters have ranks of their own."""
    record = run_tiny("method=increlora", "rank=4", "lr=1e-2", "precision=fp32", results=tmp_path / "first")
    assert len({adapter["rank"] for adapter in record.adapters}) > 1
    return tmp_path / "first" / "adapters" / str(record.run_id)


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
    for name in sorted(path.stem for path in (config_folder() / "method").glob("*.yaml")):
        settings = compose(*TINY, f"method={name}", "rank=4", *SPECIAL.get(name, [])).method
        try:
            methods.build_method(settings, started=True)
            able.append(name)
        except ConfigError:
            continue
    named = text.split('"lora, ')[1].split('"')[0]
    assert able == sorted(["lora", *named.split(", ")])


class Malicious:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pwned"),))


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
        ("no rank", "A and B of bert.* do not belong together"),
        ("dora", "use_dora is True: allowed is False"),
        ("pissa", "init_lora_weights is pissa"),
        ("kind", "peft_type is VERA: allowed is LORA"),
        ("half", "A and B of bert.* do not belong together"),
        ("strange", "is neither LoRA's A or B nor of a head"),
    ],
)
def test_a_broken_or_malicious_folder_is_refused(
    fault: str, message: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.chdir(tmp_path)
    weights, file = trained / "adapter_model.safetensors", trained / "adapter_config.json"
    config, tensors = json.loads(file.read_text()), load_file(weights)
    first = next(key for key in tensors if "lora_A" in key)
    match fault:
        case "pickle":
            weights.unlink()
            (trained / "adapter_model.bin").write_bytes(pickle.dumps(Malicious()))
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
