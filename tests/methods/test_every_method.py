"""Every method through the entry point on a tiny model: trains, records, and repeats bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, compose
from tests.support.conf_files import FITTING, METHODS, whole_runs
from wlora.adapters.layer import AdaptedLinear
from wlora.experiment import run as experiment
from wlora.experiment.dry_run import describe
from wlora.training.trainer import Trainer

OWN = {**FITTING, "wlora_depth": ["method.depth_cost=100"]}


@pytest.mark.parametrize("method", whole_runs())
def test_a_method_ends_with_a_success_record_and_repeats_bit_for_bit(
    method: str, run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    settings = [f"method={method}", "rank=4", "task.max_train_rows=192", *OWN.get(method, [])]
    first, again = (run_tiny(*settings, results=tmp_path / folder) for folder in ("a", "b"))
    assert first.status == "success" and first.metrics == again.metrics and first.adapters == again.adapters
    names = [f"{first.run_id}.jsonl" for _ in range(2)]
    curves = [(tmp_path / folder / "records" / name).read_bytes() for folder, name in zip(("a", "b"), names, strict=True)]
    assert curves[0] == curves[1]
    if method not in ("full", "probe"):
        assert first.parameters["adapter_initial"] > 0 and first.adapters


@pytest.mark.slow
def test_methods_differ_from_each_other_on_the_same_seed(run_tiny: Callable[..., Any]) -> None:
    curves = {name: run_tiny(f"method={name}", "k=2", "rank=4", "lr=3e-3", *OWN.get(name, [])).curve for name in METHODS}
    assert None not in curves.values() and len(set(curves.values())) == len(METHODS), curves


@pytest.mark.parametrize("method", ["adalora", "dynamic_lora", "lora", "full"])
def test_a_run_of_one_step_ends_well(method: str, run_tiny: Callable[..., Any]) -> None:
    assert run_tiny(f"method={method}", "rank=4", "train.max_steps=1").status == "success"


FORETOLD = ["lora", "wlora", "wlora_plus", "wlora_depth", "rlora", "rlora method.draw=at_start"]


@pytest.mark.parametrize("targets", ["qkv", "all"])
@pytest.mark.parametrize("method", [*FORETOLD, "adalora", "increlora", "lora_drop"])
def test_a_dry_run_foretells_the_parameters_at_the_end(
    method: str, targets: str, run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    words = [*f"method={method}".split(), "k=2", "rank=4", f"targets={targets}", f"results_dir={tmp_path}"]
    (line,) = re.findall(r"^at the end (.*) adapter parameters", describe(compose(*TINY, *words)), re.MULTILINE) or [None]
    record = run_tiny(*words)
    least, most = [record.parameters["adapter_initial"]] * 2
    if line is not None:
        numbers = [int(number) for number in line.replace(",", "").split(" to ")]
        least, most = numbers[0], numbers[-1]
    assert least <= record.parameters["adapter_final"] <= most
    assert (line is None) == (method in ("lora", FORETOLD[-1]) or (method == "wlora_plus" and targets == "qkv"))


PRUNING = ["wlora", "wlora_plus", "rlora", "adalora", "dynamic_lora", "lora_drop", "alora", "flexora"]


@pytest.mark.parametrize("method", whole_runs(PRUNING))
def test_what_is_pruned_stays_pruned_through_fifty_steps_of_momentum(
    method: str, run_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    class Watched(Trainer):
        def course(self, log: Any, on_step: Any = None, **options: Any) -> Any:
            return super().course(log, Watched.look, **options)

        def look(self) -> None:
            model = self.bare_model
            adapted = {name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
            ranks = {name: adapter.rank for name, adapter in self.method.attached().items()}
            moments = self.optimizers.state({p: name for name, p in model.named_parameters()})
            held = sum(value.numel() for state in moments.values() for value in state.values() if value is not None)
            frozen = [p for name, p in model.named_parameters() if not p.requires_grad and ".adapter." not in name]
            seen.append((ranks, adapted, held, sum(float(p.double().sum()) for p in frozen)))

    monkeypatch.setattr(experiment, "Trainer", Watched)
    record = run_tiny(f"method={method}", "rank=4", "train.max_steps=160", "lr=5e-3", "task.epochs=10")
    last = max(event["step"] for event in record.events)
    assert last <= 160 - 50
    ranks, adapted, _, base = seen[last]
    assert ranks != seen[0][0], "something was pruned"
    assert adapted == set(ranks), "what is cut is a plain linear again"
    assert all(point == seen[last] for point in seen[last:]), "adapters, ranks, moments, and the base"
    assert base == seen[0][3]
