"""Adapters and parameters by arithmetic: DeBERTaV3-base on the meta device, and the targets of every family.

DeBERTaV3-base has 12 layers of width d = 768 with feed-forward width f = 3072. A LoRA of rank r costs r·(d_in + d_out):
1536·r on a d×d linear and 3840·r on a feed-forward one.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.conftest import compose
from wlora.config.schema import TARGET_SETS, Config, ModelConfig
from wlora.experiment.build import assemble
from wlora.methods.base import Method, Setting, Steps
from wlora.methods.registry import build_method
from wlora.methods.wlora import WLoRA
from wlora.methods.wlora_plus import WLoRAPlus
from wlora.models.heads import head_parameters
from wlora.models.loading import build_unloaded
from wlora.models.source import ModelSource
from wlora.models.targets import Target, count_targets, list_targets

D, F = 768, 3072
SQUARE, WIDE = D + D, D + F

LAYER = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 2 * 2 * D
BODY = 12 * LAYER + 128_100 * D + 2 * 256 * D + 2 * 2 * D  # with words, relative positions and their two norms
POOLER, CLASSIFIER = D * D + D, 2 * D + 2


def attach_on_meta(*overrides: str) -> tuple[PreTrainedModel, Method, dict[str, int], Config]:
    """Attach a method to DeBERTaV3-base (or another model) without weights, and count as a dry run does."""
    if not any(word.startswith("model=") for word in overrides):
        overrides = ("model=deberta_v3_base", *overrides)
    config: Config = compose("task=rte", *overrides)
    model = build_unloaded(config.model, config.model.architecture, head="sequence_classification", num_labels=2)
    method = build_method(config.method, release=config.compat == "release")
    method.plan(Steps(total=1000, per_epoch=100))
    assembly = assemble(config, model, method)
    return model, method, assembly.count_parameters(), config


# DeBERTaV3-base ------------------------------------------------------------------------------------------------------


def test_the_model_has_184_423_682_parameters() -> None:
    assert BODY + POOLER + CLASSIFIER == 184_423_682
    model, _, counts, _ = attach_on_meta("method=lora")
    assert counts["total"] == 184_423_682
    assert counts["head"] == POOLER + CLASSIFIER == 592_130
    assert all(p.is_meta for p in model.parameters())


def test_full_trains_everything() -> None:
    model, _, counts, _ = attach_on_meta("method=full")
    assert counts["base"] + counts["head"] == counts["total"] == 184_423_682
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 184_423_682
    assert counts["adapter_initial"] == 0


def test_full_of_the_release_trains_attention_and_output_dense_only() -> None:
    # Per layer q, k, v, the attention's output and the feed-forward's second linear; no norms, words, head.
    per_layer = 4 * (D * D + D) + (F * D + D)
    _, _, counts, _ = attach_on_meta("method=full", "compat=release")
    assert counts["base"] + counts["head"] == 12 * per_layer == 56_669_184
    assert counts["head"] == 0


@pytest.mark.parametrize(
    ("targets", "n", "per_rank"),
    [
        ("qkv", 36, 36 * SQUARE),
        ("attention", 48, 48 * SQUARE),
        ("all", 72, 48 * SQUARE + 24 * WIDE),
        ("release", 60, 48 * SQUARE + 12 * WIDE),
    ],
)
@pytest.mark.parametrize("rank", [4, 8])
def test_lora_costs_rank_times_the_widths_of_its_n_targets(targets: str, n: int, per_rank: int, rank: int) -> None:
    _, method, counts, _ = attach_on_meta("method=lora", f"rank={rank}", f"targets={targets}")
    assert len(method.adapters) == n
    assert counts["adapter_initial"] == counts["adapter_final"] == rank * per_rank


@pytest.mark.parametrize(
    ("rank", "targets", "expected"),
    [(8, "qkv", 442_368), (4, "qkv", 221_184), (4, "all", 663_552), (4, "release", 479_232)],
)
def test_lora_has_the_numbers_of_the_paper_and_its_release(rank: int, targets: str, expected: int) -> None:
    _, _, counts, _ = attach_on_meta("method=lora", f"rank={rank}", f"targets={targets}")
    assert counts["adapter_initial"] == expected
    if targets == "release":
        assert f"{expected / counts['total']:.2%}" == "0.26%"


@pytest.mark.parametrize("method", ["wlora", "wlora_plus", "rlora"])
def test_the_other_methods_start_at_loras_count_and_omega_is_not_in_it(method: str) -> None:
    assert attach_on_meta(f"method={method}")[2]["adapter_initial"] == 36 * SQUARE * 8 == 442_368


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("adalora", 36 * 12 * SQUARE),  # 663,552: it starts at rank 12 = 1.5·8 and ends at 442,368
        ("dynamic_lora", 36 * 12 * SQUARE),  # likewise; Table 1 prints 626K, see test_methods_pruning
        ("increlora", 36 * (1 + 4) * SQUARE),  # 276,480: rank 1 and a reserve of 4 train; see test_methods_increlora
        ("lora_drop", 36 * 8 * SQUARE),  # ends at half, 221,184, Table 1's 221K
        ("alora", 36 * 8 * SQUARE),  # 442,368 throughout; Table 1's 664K counts pruned components, or starts at rank 12
        ("flexlora", 36 * 8 * SQUARE),  # Table 1's 442K
        ("flexora", 36 * 8 * SQUARE),
        ("milora", 36 * 8 * SQUARE),
        ("melora", 36 * 2 * SQUARE),  # 110,592: mini rank 2; Table 1's 110K
        ("nora", 36 * 2 * 64 * 8),  # 2·r·r' per matrix: 1,024
        ("tied_lora", 4 * D * 8 + 12 * (8 + 3 * D)),  # 52,320, as on a fused qkv
        ("vera", 36 * (D + 1024)),  # 64,512
        ("vb_lora method.rank=4", 90 * 256 + 36 * (2 * 4 * 3) * 90),  # 100,800: bank and logits, of which few are stored
        ("dora", 36 * 8 * SQUARE + 36 * D),  # 470,016: LoRA's and a magnitude per output row
    ],
)
def test_every_method_starts_at_the_count_of_the_methods_note(method: str, expected: int) -> None:
    assert attach_on_meta(*f"method={method}".split())[2]["adapter_initial"] == expected


@pytest.mark.parametrize(("k", "expected"), [(1, 12_288), (5, 61_440), (10, 122_880)])
def test_wlora_keeps_k_times_12_288_parameters(k: int, expected: int) -> None:
    model, method, _, _ = attach_on_meta("method=wlora", f"k={k}")
    assert isinstance(method, WLoRA)
    survivors = list(method.adapters)[:k]
    # On the meta device ω has no value to report; which adapters leave does not depend on it.
    method.omegas = lambda: dict.fromkeys(survivors, 1.0)  # type: ignore[method-assign]
    event = method.cut(10, survivors)
    assert event.details["kept"] == survivors
    assert method.adapters.count() == k * 8 * SQUARE == expected
    assert trainable_matrices(model) == expected


def trainable_matrices(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith((".adapter.A", ".adapter.B")))


class Square36(nn.Module):
    """36 linears of one width, as many as DeBERTaV3-base has in `qkv`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(36))
        self.requires_grad_(False)


@pytest.mark.parametrize("extension", ["qr", "gaussian"])
@pytest.mark.parametrize(("width", "expected"), [(64, 36_864), (D, 442_368)])
def test_wlora_plus_keeps_its_budget_through_both_halvings(width: int, expected: int, extension: str) -> None:
    # 36 adapters of rank 8, then 18 of rank 16, then 9 of rank 32: the product stays 288.
    model, budget = Square36(width), 36 * 8 * 2 * width
    words = ["method=wlora_plus", "model=deberta_v3_base", "method.schedule=halvings", "method.select_steps=10"]
    config = compose(*words, f"method.extension={extension}")
    method = build_method(config.method)
    assert isinstance(method, WLoRAPlus)
    method.plan(Steps(total=100, per_epoch=50))
    targets = [Target(f"layers.{index}", index, "linear") for index in range(36)]
    method.attach(model, Setting(targets, targets, torch.Generator().manual_seed(0)))
    assert method.adapters.count() == budget == expected
    for adapter, value in zip(method.adapters.values(), range(36), strict=True):
        assert adapter.omega is not None
        adapter.omega.data.fill_(1 + value / 100)
    for step, n, rank in [(5, 18, 16), (10, 9, 32)]:
        assert method.after_step(step - 1) == []
        cut, extend = method.after_step(step)
        assert (cut.kind, extend.kind) == ("cut", "extend")
        assert len(method.adapters) == n and {a.rank for a in method.adapters.values()} == {rank}
        assert set(extend.details["ranks"].values()) == {rank}
        assert method.adapters.count() == trainable_matrices(model) == budget
    assert method.after_step(11) == []


# Targets of every family ---------------------------------------------------------------------------------------------

FAMILIES = ["tiny_deberta", "tiny_bert", "tiny_bart", "tiny_llama"]
# The release's typo loses the first feed-forward linear of a layer where it is called `intermediate.dense`.
LINEARS_PER_LAYER: dict[str, dict[str, float]] = {
    "tiny_deberta": {"qkv": 3, "attention": 4, "all": 6, "release": 5},
    "tiny_bert": {"qkv": 3, "attention": 4, "all": 6, "release": 5},
    "tiny_bart": {"qkv": 4.5, "attention": 6, "all": 8, "release": 8},  # mean of encoder and decoder
    "tiny_llama": {"qkv": 3, "attention": 4, "all": 7, "release": 7},
}


def build_tiny(name: str) -> tuple[ModelConfig, nn.Module, dict[str, Any]]:
    from wlora.models.loading import load_model
    from wlora.models.tokenizer import load_tokenizer

    model: ModelConfig = compose("task=story_nli", f"model={name}", "k=1").model
    source = ModelSource(None, None)
    tokenizer = load_tokenizer(model, source)
    built = load_model(model, source, tokenizer, head="sequence_classification", num_labels=3, seed=0)
    return model, built, built.config.to_dict()


def stack_linears(model: nn.Module) -> list[str]:
    """Name the linears inside the layers, in the model's own order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.layers?\.\d+\.", name)
    ]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("targets", TARGET_SETS)
def test_targets_are_the_models_own_modules_and_nothing_of_the_head(name: str, targets: str) -> None:
    config, model, architecture = build_tiny(name)
    found = list_targets(architecture, targets)
    names = [target.name for target in found]
    assert found == list_targets(config.architecture, targets), "the YAML and the loaded model disagree"
    assert len(set(names)) == len(names) == count_targets(architecture, targets)
    layers = 4 if name == "tiny_bart" else 2
    assert len(names) == layers * LINEARS_PER_LAYER[name][targets]
    assert all(isinstance(model.get_submodule(target), nn.Linear) for target in names)
    head = {parameter.rpartition(".")[0] for parameter in head_parameters(model)}
    assert head and not head & set(names)
    assert not any(word in target for target in names for word in ("pooler", "classif", "score", "embed", "lm_head"))
    assert [target.layer for target in found] == sorted(target.layer for target in found)
    assert {target.layer for target in found} == set(range(layers))


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_stand_in_the_order_of_named_modules_in_which_the_release_numbers_them(name: str) -> None:
    _, model, architecture = build_tiny(name)
    linears = stack_linears(model)
    assert [target.name for target in list_targets(architecture, "all")] == linears
    for targets in TARGET_SETS:
        names = [target.name for target in list_targets(architecture, targets)]
        assert names == [linear for linear in linears if linear in names]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_target_set_from_a_layer_up_is_its_upper_part(name: str) -> None:
    architecture = build_tiny(name)[2]
    whole = list_targets(architecture, "qkv")
    highest = whole[-1].layer
    assert list_targets(architecture, "qkv@0") == whole
    assert list_targets(architecture, f"qkv@{highest}") == [target for target in whole if target.layer == highest]
    assert list_targets(architecture, f"qkv@{highest + 1}") == []


BART_LARGE = {"model_type": "bart", "encoder_layers": 12, "decoder_layers": 12}
LLAMA3_8B = {"model_type": "llama", "num_hidden_layers": 32}


@pytest.mark.parametrize(
    ("architecture", "targets", "n"),
    [
        (BART_LARGE, "qkv", 12 * 3 + 12 * 6),  # self-attention in both stacks, cross-attention in the decoder
        (BART_LARGE, "attention", 12 * 4 + 12 * 8),
        (BART_LARGE, "all", 12 * 6 + 12 * 10),
        (LLAMA3_8B, "qkv", 32 * 3),
        (LLAMA3_8B, "attention", 32 * 4),
        (LLAMA3_8B, "all", 32 * 7),
    ],
)
def test_the_papers_other_models_have_n_targets(architecture: dict[str, Any], targets: str, n: int) -> None:
    assert count_targets(architecture, targets) == n
    assert count_targets(BART_LARGE, "qkv") == 108 and count_targets(BART_LARGE, "all") == 192
    assert count_targets(LLAMA3_8B, "all") == 224


# The paper's other models --------------------------------------------------------------------------------------------


def shares(counts: dict[str, int]) -> tuple[str, str]:
    """Return the adapters' shares of the logical and of the stored elements, in per cent with three digits."""
    adapters = counts["adapter_initial"]
    return f"{100 * adapters / counts['total']:.3f}", f"{100 * adapters / counts['stored']:.3f}"


@pytest.mark.parametrize("rank", [1, 8])
def test_bart_large_has_192_linears_and_540_672_elements_per_rank(rank: int) -> None:
    # Self-attention in 24 layers, cross-attention in 12: 36·4 squares of 1024; two feed-forward linears in 24 layers.
    per_rank = 36 * 4 * (1024 + 1024) + 24 * 2 * (1024 + 4096)
    assert per_rank == 540_672
    _, method, counts, config = attach_on_meta("model=bart_large", "targets=all", "method=lora", f"rank={rank}")
    assert len(method.adapters) == 192 and counts["adapter_initial"] == rank * per_rank
    assert config.k == 20
    # Without the classification head, of 1024² + 1024 and (with two labels) 2050 elements, it is Table 5's model.
    body = counts["total"] - (1024 * 1024 + 1024 + 2050)
    assert body == 406_291_456
    adapters = counts["adapter_initial"]
    # The paper's percentages count the adapters in the whole, too.
    assert f"{100 * adapters / (body + adapters):.2f}" == {1: "0.13", 8: "1.05"}[rank]
    if rank == 1:
        assert shares(counts) == ("0.133", "0.133")


def test_bart_large_has_108_linears_of_queries_keys_and_values() -> None:
    _, method, counts, _ = attach_on_meta("model=bart_large", "targets=qkv", "method=lora", "rank=1")
    assert len(method.adapters) == 108 and counts["adapter_initial"] == 108 * 2048


@pytest.mark.parametrize(("rank", "logical", "stored"), [(1, 35, 65), (2, 70, 131), (4, 140, 261), (8, 279, 522)])
def test_llama3_8b_has_the_papers_percentages_of_its_stored_elements(rank: int, logical: int, stored: int) -> None:
    words = ["model=llama3_8b", "targets=all", "method=lora", f"rank={rank}"]
    # Per layer: q and o of 4096², k and v of 4096×1024, three feed-forward linears of 4096×14336.
    per_rank = 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    linears = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    total = linears + 128_256 * 4096 + (2 * 32 + 1) * 4096 + 2 * 4096  # with words, norms and the head for two classes
    assert (per_rank, total) == (2_621_440, 7_504_932_864)
    _, method, plain, config = attach_on_meta(*words)
    assert len(method.adapters) == 224 and config.train.accumulation_steps == 2
    assert plain["adapter_initial"] == rank * per_rank and plain["stored"] == plain["total"] == total
    _, _, packed, _ = attach_on_meta(*words, "model.quantization=nf4")
    assert packed["stored"] == total - linears // 2 == 4_015_271_936
    assert shares(packed) == (f"0.{logical:03}", f"0.{stored:03}")
    _, _, eight, _ = attach_on_meta(*words, "model.quantization=int8")
    assert eight["stored"] == total


def test_llama3_8b_keeps_100_adapters_with_weightlora() -> None:
    assert compose("model=llama3_8b", "targets=all", "method=wlora").method["k"] == 100
    assert compose("model=llama3_8b", "targets=qkv", "method=wlora").method["k"] == 96, "all there are"


def test_smollm2_135m_has_its_134_515_008_parameters_and_a_head() -> None:
    _, method, counts, config = attach_on_meta("model=smollm2_135m", "targets=all", "method=lora", "rank=1")
    assert len(method.adapters) == 210 and config.k == 20
    assert counts["total"] == 134_515_008 + 2 * 576
