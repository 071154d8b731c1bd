"""A base packed by bitsandbytes: what is packed and counted, what trains on top of it, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import TINY, compose
from tests.support.bart_folder import build_bart_folder
from tests.support.hub_folder import build_folder
from tests.support.llama_folder import build_llama_folder, llama_weights
from wlora.errors import ConfigError
from wlora.experiment.build import assemble
from wlora.experiment.summary import share_of_model
from wlora.methods.base import Method
from wlora.methods.milora import decompose_base
from wlora.methods.registry import build_method
from wlora.models.architectures import read_architecture
from wlora.models.heads import head_parameters
from wlora.models.loading import build_unloaded, load_model
from wlora.models.source import locate
from wlora.models.tokenizer import load_tokenizer
from wlora.training.precision import Precision, lower_base

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODELS = {"llama3_8b": build_llama_folder, "bart_large": build_bart_folder, "deberta_v3_base": build_folder}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    hub = tmp_path_factory.mktemp("hub")
    return {name: build(hub / name) for name, build in MODELS.items()}


class Rig:
    """A folder's model, packed, with an adapter on every linear whose B is not zero."""

    def __init__(self, folder: Path, name: str, quantization: str, precision: str = "fp32", method: str = "lora") -> None:
        words = [f"model={name}", f"model.path={folder}", f"model.quantization={quantization}", f"method={method}"]
        self.config = compose("task=story_nli", "targets=all", "rank=4", "dropout=0", *words)
        source = locate(self.config.model)
        self.tokenizer = load_tokenizer(self.config.model, source)
        self.model = load_model(
            self.config.model,
            source,
            self.tokenizer,
            head="sequence_classification",
            num_labels=3,
            seed=0,
            device=CPU,
            dtype=DTYPES[precision],
        )
        self.method: Method = build_method(self.config.method, quantized=quantization != "none")
        assembly = assemble(self.config, self.model, self.method)
        self.head = assembly.head
        with torch.no_grad():
            for adapter in self.method.adapters.values():
                adapter.B.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
        lower_base(self.model, Precision(precision, "test"))
        self.counts = assembly.count_parameters()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of one batch in training mode, its dropout always drawn alike."""
        self.model.train()
        torch.manual_seed(0)
        texts = ["Anna went to the library.", "Ben took the ball. " * 3]
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        self.model(**batch, labels=torch.tensor([0, 2])).loss.backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return found


@torch.no_grad()
def unpack(linear: nn.Module) -> torch.Tensor:
    """Return the weight by which a packed linear multiplies in training."""
    linear.train()
    zero, unit = torch.zeros(1, linear.in_features), torch.eye(linear.in_features)  # type: ignore[call-overload]
    return (linear(unit) - linear(zero)).T  # type: ignore[no-any-return]


def base(rig: Rig, name: str) -> nn.Module:
    return rig.model.get_submodule(name).get_submodule("base")


# What is packed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_all_targets_are_packed_in_4_bits_and_the_head_is_not(name: str, folders: dict[str, Path]) -> None:
    rig = Rig(folders[name], name, "nf4")
    assert rig.method.adapters
    for target in rig.method.adapters:
        linear: Any = base(rig, target)
        assert linear.weight.dtype == torch.uint8 and linear.weight.numel() == linear.in_features * linear.out_features // 2
    head = head_parameters(rig.model)
    assert head and all(p.dtype == torch.float32 and p.requires_grad for p in head.values())
    assert rig.model.get_input_embeddings().weight.is_floating_point()


def test_int8_has_one_element_per_weight(folders: dict[str, Path]) -> None:
    rig = Rig(folders["llama3_8b"], "llama3_8b", "int8")
    assert {base(rig, name).weight.dtype for name in rig.method.adapters} == {torch.int8}
    assert rig.counts["stored"] == rig.counts["total"] and "stored" not in share_of_model(10, rig.counts)


def test_the_packed_weights_are_the_folders_within_their_steps(folders: dict[str, Path]) -> None:
    rig = Rig(folders["llama3_8b"], "llama3_8b", "nf4")
    name = "model.layers.1.mlp.down_proj"
    unpacked = unpack(base(rig, name))
    weight = llama_weights()[f"{name}.weight"].float()
    # The widest step of nf4 is 0.3 of a block's largest weight; rounding is off by half a step at most.
    assert 0 < float((unpacked - weight).abs().max()) <= 0.16 * float(weight.abs().max())


# What is counted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_dry_run_counts_what_a_run_finds_in_memory(name: str, quantization: str, folders: dict[str, Path]) -> None:
    rig = Rig(folders[name], name, quantization)
    architecture = read_architecture(rig.config.model)
    on_meta = build_unloaded(rig.config.model, architecture, head="sequence_classification", num_labels=3)
    method = build_method(rig.config.method)
    assert assemble(rig.config, on_meta, method).count_parameters() == rig.counts
    packed = sum(base(rig, target).weight.numel() for target in rig.method.adapters) if quantization == "nf4" else 0
    assert rig.counts["total"] - rig.counts["stored"] == packed


def test_both_shares_are_said_where_they_differ() -> None:
    counts = {"base": 0, "total": 2_000, "stored": 1_000}
    assert share_of_model(10, counts) == "0.500% of 2,000, 1.000% of 1,000 stored, 0.990% including the adapters"
    assert share_of_model(10, counts | {"stored": 2_000}) == "0.500% of 2,000, 0.498% including the adapters"
    assert share_of_model(1_000, counts | {"base": 1_000, "stored": 2_000}) == "50.000% of 2,000", "they are among the 2,000"


# What trains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_on_a_plain_base_of_the_unpacked_weights(
    name: str, quantization: str, folders: dict[str, Path]
) -> None:
    plain, packed = (Rig(folders[name], name, kind) for kind in ("none", quantization))
    for target in plain.method.adapters:
        weight: Any = base(plain, target).weight
        before = weight.clone()
        weight.copy_(unpack(base(packed, target)))
        assert not torch.equal(before, weight)
    expected, found = plain.gradients(), packed.gradients()
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        assert found[key].dtype == torch.float32
        assert torch.allclose(found[key], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max())), key


@pytest.mark.parametrize("name", ["llama3_8b", "bart_large"])
def test_an_evaluation_in_between_does_not_change_the_gradients(name: str, folders: dict[str, Path]) -> None:
    # bitsandbytes repacks weights for inference on some processors, and no gradient flows through those.
    rig = Rig(folders[name], name, "nf4", "bf16")
    before = rig.gradients()
    rig.model.eval()
    with torch.no_grad():
        rig.model(**rig.tokenizer("Anna left.", return_tensors="pt"))
    after = rig.gradients()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_records_both_counts(
    quantization: str, precision: str, folders: dict[str, Path], run_tiny: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["model=llama3_8b", f"model.path={folders['llama3_8b']}", "method=wlora", "targets=all", "k=3", "rank=4"]
    record = run_tiny(*words, f"model.quantization={quantization}", f"precision={precision}", "train.max_steps=16")
    out, err = capfd.readouterr()
    assert record.status == "success" and len(record.adapters) <= 3 and err == ""
    body = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    counts = record.parameters
    assert counts["total"] - counts["stored"] == (body // 2 if quantization == "nf4" else 0)
    assert (f"of {counts['stored']:,} stored" in out) == (quantization == "nf4")
    assert record.config["model"]["quantization"] == quantization


def test_a_disconnected_adapter_leaves_the_packed_linear_and_folding_is_refused(folders: dict[str, Path]) -> None:
    rig = Rig(folders["llama3_8b"], "llama3_8b", "nf4")
    first, second = list(rig.method.adapters)[:2]
    linear = base(rig, first)
    rig.method.adapters.disconnect(first)
    assert rig.model.get_submodule(first) is linear
    with pytest.raises(TypeError, match="merged into a floating-point weight only"):
        rig.method.adapters.fold(second)
    with pytest.raises(ConfigError, match="cannot be decomposed"):
        decompose_base(second, base(rig, second), method="nora")


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "milora", "nora", "dora"])
@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_methods_that_need_the_bases_own_weights_are_refused_before_loading(
    method: str, dry_run: str, run_main: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wlora.experiment.shared_inputs.load_base", None)
    code, _, errors = run_main("model=minilm", "model.quantization=nf4", f"method={method}", *TINY[:1], f"dry_run={dry_run}")
    assert code == 2 and errors.splitlines() == [
        f"error: method={method}: reads or trains the base's own weights: allowed is model.quantization=none"
    ]


def test_random_weights_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="model.quantization=nf4: allowed is none for model=tiny_llama"):
        compose("model=tiny_llama", "model.quantization=nf4")
    with pytest.raises(ConfigError, match=r"model.quantization=fp4: allowed is none \| nf4 \| int8"):
        compose("model=minilm", "model.quantization=fp4")


def test_without_the_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    code, _, errors = run_main("model=minilm", "task=story_nli", "model.quantization=nf4")
    assert code == 2 and errors.splitlines() == [
        "error: model.quantization=nf4: the package bitsandbytes is not installed",
        "way out: pip install 'wlora[quantization]'",
    ]
