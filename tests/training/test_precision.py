"""Precision: the frozen base may be low, whatever trains stays float32, and scores hardly move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import PreTrainedModel

from tests.conftest import compose
from wlora.experiment.build import assemble
from wlora.methods.base import Method
from wlora.methods.registry import build_method
from wlora.methods.selection import widest
from wlora.models.heads import head_parameters
from wlora.models.loading import load_model
from wlora.models.source import ModelSource
from wlora.models.tokenizer import load_tokenizer
from wlora.training import precision as precision_module
from wlora.training.precision import Precision, choose_precision, has_accelerator, lower_base

FAMILIES = ["tiny_bert", "tiny_deberta", "tiny_bart", "tiny_llama"]
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")
LABELS = 3


class Rig:
    """A tiny model with WeightLoRA's adapters, whose B is not zero, in one precision."""

    def __init__(self, name: str, chosen: str, method: str = "wlora", *, emulated: bool = False) -> None:
        config = compose("task=story_nli", f"model={name}", f"method={method}", "rank=4", "k=1", "dropout=0")
        source = ModelSource(None, None)
        self.tokenizer = load_tokenizer(config.model, source)
        self.model: PreTrainedModel = load_model(
            config.model, source, self.tokenizer, head="sequence_classification", num_labels=LABELS, seed=0
        )
        self.method: Method = build_method(config.method)
        self.head = assemble(config, self.model, self.method).head
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for adapter in self.method.adapters.values():
                adapter.B.normal_(0, 0.05, generator=generator)
        lower_base(self.model, Precision(chosen, "test", emulated))
        self.model.eval()

    def batch(self) -> dict[str, Tensor]:
        """Return a padded batch: rows of very different lengths."""
        firsts = ["Anna went to the library.", "Ben took the ball. " * 12, "Clara entered the school. Ben found the ring."]
        encoded = self.tokenizer(firsts, ["Anna is in the library."] * 3, padding=True, return_tensors="pt")
        assert 0 < int(encoded["attention_mask"].sum()) < encoded["attention_mask"].numel()
        if self.model.config.model_type in ("bart", "llama"):
            encoded.pop("token_type_ids")
        return {**encoded, "labels": torch.tensor([0, 1, 2])}

    def forward(self) -> Any:
        return self.model(**self.batch())


# The choice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_what_is_asked_for_is_taken(name: str) -> None:
    chosen = choose_precision(name, CPU)
    assert chosen.name == name and chosen.reason.startswith("asked for")
    assert chosen.dtype == {"fp32": torch.float32, **LOW}[name]


def test_auto_on_a_processor_takes_what_it_multiplies_fast_and_says_so() -> None:
    chosen = choose_precision("auto", CPU)
    assert chosen.name in ("fp32", "bf16") and "multipl" in chosen.reason


@pytest.mark.parametrize(("fast", "name"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_processor(fast: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "_cpu_multiplies_bf16", lambda: fast)
    assert choose_precision("auto", CPU).name == name


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_emulated_where_it_is_asked_for_and_slow(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "_cpu_multiplies_bf16", lambda: fast)
    assert choose_precision("bf16", CPU).emulated is not fast
    assert not any(choose_precision(name, CPU).emulated for name in ("auto", "fp32", "fp16"))
    assert not choose_precision("bf16", torch.device("cuda")).emulated


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")])
def test_auto_on_a_gpu_follows_its_generation(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    chosen = choose_precision("auto", torch.device("cuda"))
    assert chosen.name == name and chosen.reason.startswith("Some GPU")


def test_auto_elsewhere_is_float32() -> None:
    assert choose_precision("auto", torch.device("mps")).name == "fp32"


# The model -----------------------------------------------------------------------------------------------------------


def test_float32_leaves_the_model_alone() -> None:
    rig = Rig("tiny_bert", "fp32")
    assert all(p.dtype == torch.float32 for p in rig.model.parameters())
    assert not any(module._forward_pre_hooks for module in rig.model.modules())


def test_apples_gpu_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert Accelerator(cpu=not has_accelerator()).device.type == "cpu"
    for check in ("is_available", "is_built"):
        monkeypatch.setattr(torch.backends.mps, check, lambda: True)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        device = Accelerator(cpu=not has_accelerator()).device
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert device.type == "mps" and widest(device) == torch.float32
    assert choose_precision("auto", device).name == "fp32"


@pytest.mark.parametrize("chosen", LOW)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_base_is_low_and_what_trains_is_float32(name: str, chosen: str) -> None:
    rig = Rig(name, chosen)
    head = head_parameters(rig.model)
    assert len(rig.method.adapters) > 0 and head
    for parameter_name, parameter in rig.model.named_parameters():
        spared = ".adapter." in parameter_name or parameter_name in head
        assert parameter.dtype == (torch.float32 if spared else LOW[chosen]), parameter_name
        assert parameter.requires_grad == spared, parameter_name
    assert all(a.omega is not None and a.omega.dtype == torch.float32 for a in rig.method.adapters.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_emulated_bfloat16_gives_the_numbers_of_native_bfloat16(name: str) -> None:
    single, native, emulated = Rig(name, "fp32"), Rig(name, "bf16"), Rig(name, "bf16", emulated=True)
    weights = dict(native.model.named_parameters())
    linears = {f"{at}.weight" for at, module in emulated.model.named_modules() if type(module) is torch.nn.Linear}
    for parameter_name, parameter in emulated.model.named_parameters():
        assert torch.equal(parameter, weights[parameter_name].to(parameter.dtype)), parameter_name
        assert parameter.dtype == torch.float32 or parameter_name not in linears
    losses = []
    for rig in (single, native, emulated):
        losses.append(rig.forward().loss)
        losses[-1].backward()
    assert abs(losses[2] - losses[1]) < max(2e-4, 0.5 * abs(losses[0] - losses[1]))
    found, expected = (
        torch.cat([p.grad.flatten() for p in rig.model.parameters() if p.grad is not None]) for rig in (emulated, native)
    )
    assert float(torch.cosine_similarity(expected, found, dim=0)) > 0.99


def test_an_emulated_linear_rounds_the_float32_product_once() -> None:
    rig = Rig("tiny_bert", "bf16", emulated=True)
    linear = next(m for name, m in rig.model.named_modules() if name.endswith("intermediate.dense"))
    x = torch.randn(5, linear.in_features).bfloat16().requires_grad_()
    out = linear(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.nn.functional.linear(x.float(), linear.weight, linear.bias).bfloat16())
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("chosen", LOW)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_loss_are_float32_and_close_to_those_of_float32(name: str, chosen: str) -> None:
    with torch.no_grad():
        reference, low = Rig(name, "fp32").forward(), Rig(name, chosen).forward()
    assert low.logits.dtype == low.loss.dtype == torch.float32 and low.logits.shape == (3, LABELS)
    spread = float(reference.logits.std())
    assert spread > 0
    assert float((low.logits - reference.logits).abs().max()) < 0.1 * spread
    assert abs(float(low.loss - reference.loss)) < 0.02


@pytest.mark.parametrize("chosen", LOW)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_finite_float32_and_point_where_those_of_float32_do(name: str, chosen: str) -> None:
    reference, low = Rig(name, "fp32"), Rig(name, chosen)
    for rig in (reference, low):
        rig.forward().loss.backward()
    expected, found = (
        torch.cat([p.grad.flatten() for p in rig.model.parameters() if p.grad is not None]) for rig in (reference, low)
    )
    trained = [p for p in low.model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in trained)
    assert float(torch.cosine_similarity(expected, found, dim=0)) > 0.95


@pytest.mark.parametrize("chosen", LOW)
def test_padding_does_not_overflow_and_changes_little_on_deberta(chosen: str) -> None:
    # Masked positions of DeBERTa's attention are filled with the smallest number of the dtype at hand.
    rig = Rig("tiny_deberta", chosen)
    batch = rig.batch()
    with torch.no_grad():
        together = rig.model(**batch).logits
        length = int(batch["attention_mask"][0].sum())
        alone = rig.model(**{key: value[:1, :length] for key, value in batch.items() if key != "labels"}).logits
    assert bool(together.isfinite().all())
    assert torch.allclose(together[:1], alone, atol=0.02)


@pytest.mark.parametrize("chosen", LOW)
def test_large_activations_of_deberta_stay_finite(chosen: str) -> None:
    # Attention scores far beyond a trained model's; float16 ends at 65,504.
    rig = Rig("tiny_deberta", chosen)
    with torch.no_grad():
        for name, parameter in rig.model.named_parameters():
            if name.endswith(("query_proj.base.weight", "key_proj.base.weight")):
                parameter.mul_(100)
    out = rig.forward()
    out.loss.backward()
    assert bool(out.logits.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in rig.model.parameters() if p.grad is not None)


# Whole runs ----------------------------------------------------------------------------------------------------------

SHORT = ["task.max_train_rows=64", "train.max_steps=16", "precision=bf16"]


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("method", ["wlora_plus", "full"])
def test_runs_in_bfloat16_end_in_success(model: str, method: str, run_tiny: Any) -> None:
    record = run_tiny(f"model={model}", f"method={method}", *SHORT)
    assert record.status == "success" and record.environment["precision"] == "bf16"
    assert 0 <= record.metrics["accuracy"] <= 1


@pytest.mark.parametrize("chosen", ["bf16", "fp16"])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_deberta"])
def test_full_fine_tuning_keeps_float32_master_weights(
    model: str, chosen: str, run_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wlora.experiment import run as experiment
    from wlora.training.trainer import Trainer

    trained: list[Any] = []

    class Watched(Trainer):
        def course(self, log: Any, on_step: Any = None, **options: Any) -> Any:
            assert self.settings.autocast == LOW[chosen], "the forward pass is the low part"
            trained.append(self.bare_model)
            return super().course(log, on_step, **options)

    monkeypatch.setattr(experiment, "Trainer", Watched)
    record = run_tiny(f"model={model}", "method=full", *SHORT[:2], f"precision={chosen}")
    (bare,) = trained
    assert record.status == "success"
    assert all(p.dtype == torch.float32 and p.requires_grad for p in bare.parameters())


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_deberta"])
def test_a_run_in_bfloat16_scores_about_as_one_in_float32(model: str, run_tiny: Any) -> None:
    words = [f"model={model}", "method=lora", "train.max_steps=32", "task.max_eval_rows=96"]
    low, reference = (run_tiny(*words, f"precision={name}").metrics for name in ("bf16", "fp32"))
    assert abs(low["accuracy"] - reference["accuracy"]) <= 0.15
    assert abs(low["loss"] - reference["loss"]) <= 0.05
