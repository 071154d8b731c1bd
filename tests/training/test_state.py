"""The state of every method survives being written and read, at any step: the rest of the run is the same, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from tests.support.conf_files import FITTING, whole_runs
from wlora.experiment import run as experiment
from wlora.training.state import State, capture
from wlora.training.trainer import Trainer

OWN = {**FITTING, "lora_drop": ["method.share=true"], "flexlora": ["method.ranks=[2,4,4,3]"]}
STEPS = 24


def written(state: State) -> tuple[bytes, str]:
    return save({key: value.contiguous() for key, value in state.tensors.items()}), json.dumps(state.facts)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, run_tiny: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that trains, from a written state if one is given: record, parameters, states of a whole run."""

    def train(*overrides: str, results: Path, start: tuple[bytes, str] | None = None) -> tuple[Any, dict[str, Any], Any]:
        states: dict[int, tuple[bytes, str]] = {}
        last: dict[str, Any] = {}

        class Watched(Trainer):
            def course(self, log: Any, on_step: Any = None, **options: Any) -> Any:
                def keep(trainer: Trainer) -> None:
                    states[trainer.step] = written(trainer.capture())

                if start is not None:
                    self.restore(State(json.loads(start[1]), load(start[0])))
                result = yield from super().course(log, keep if start is None else None, **options)
                last.update({name: p.detach().clone() for name, p in self.bare_model.named_parameters()})
                return result

        monkeypatch.setattr(experiment, "Trainer", Watched)
        return run_tiny(*overrides, f"train.max_steps={STEPS}", results=results), last, states

    return train


@pytest.mark.parametrize("method", whole_runs())
def test_a_run_goes_on_from_its_written_state_as_if_nothing_had_happened(
    method: str, trained: Callable[..., Any], tmp_path: Path
) -> None:
    settings = [f"method={method}", "rank=4", "task.max_train_rows=160", "train.eval_every=6", *OWN.get(method, [])]
    whole, parameters, states = trained(*settings, results=tmp_path / "whole")
    curve = (tmp_path / "whole" / "records" / f"{whole.run_id}.jsonl").read_text().splitlines()
    assert sorted(states) == list(range(1, STEPS + 1))
    changes = [event["step"] for event in whole.events]
    for step in sorted({11, STEPS - 1, *(s for change in changes[:2] for s in (change - 1, change))} & set(states)):
        rest, again, _ = trained(*settings, results=tmp_path / f"from{step}", start=states[step])
        assert rest.metrics == whole.metrics, step
        assert (rest.adapters, rest.events, rest.parameters) == (whole.adapters, whole.events, whole.parameters), step
        assert list(again) == list(parameters)
        assert all(torch.equal(again[name], parameters[name]) for name in parameters), step
        tail = (tmp_path / f"from{step}" / "records" / f"{rest.run_id}.jsonl").read_text().splitlines()
        assert tail == [line for line in curve if json.loads(line)["step"] > step]


def test_the_frozen_base_is_no_part_of_a_state(trained: Callable[..., Any], tmp_path: Path) -> None:
    _, parameters, states = trained("method=lora", "rank=4", results=tmp_path)
    held = {name.removeprefix("model/") for name in load(states[3][0]) if name.startswith("model/")}
    assert held and held <= set(parameters)
    assert all("adapter" in name or "classifier" in name or "pooler" in name for name in held)


def test_a_state_without_its_momentum_would_show(trained: Callable[..., Any], tmp_path: Path) -> None:
    whole, _, states = trained("method=lora", "rank=4", results=tmp_path / "whole")
    facts = json.loads(states[11][1])
    facts["optimizers"] = {"is": "dict", "keys": [], "values": []}
    rest, _, _ = trained("method=lora", "rank=4", results=tmp_path / "rest", start=(states[11][0], json.dumps(facts)))
    assert rest.metrics["loss"] != whole.metrics["loss"]


def test_an_attribute_of_an_unknown_kind_is_refused() -> None:
    from wlora.adapters.adapter_set import AdapterSet
    from wlora.methods.probe import Probe
    from wlora.training.optimizers import Optimizers

    model, method = nn.Linear(2, 2), Probe()
    method.adapters = AdapterSet(model)
    method.file = open  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="method/file: a builtin"):
        capture(model, method, Optimizers([], weight_decay=0.0))
