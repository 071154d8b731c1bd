"""Experiment trackers: they get the learning curve, decide nothing, and cannot break a run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as theirs

from tests.conftest import TINY, compose
from wlora.config.schema import TRACKERS
from wlora.errors import ConfigError
from wlora.storage.trackers import PACKAGES, flatten, require_tracker


class Fake(theirs.GeneralTracker):
    """A tracker that remembers, and raises where it is told to."""

    name = "wandb"
    requires_logging_directory = False
    fails_at: str | None = None
    seen: list[tuple[Any, ...]]

    def __init__(self, project: str, **kwargs: Any) -> None:
        super().__init__()
        self.note("init", project, kwargs)

    def note(self, what: str, *details: Any) -> None:
        Fake.seen.append((what, *details))
        if what == Fake.fails_at:
            raise ConnectionError("no answer from the server\nand more")

    def start(self) -> None:
        self.note("start")

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.note("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.note("log", step, values)

    def finish(self) -> None:
        self.note("finish")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """Stand in for wandb."""
    monkeypatch.setitem(theirs.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(theirs, "get_available_trackers", lambda: [theirs.LoggerType.WANDB])
    Fake.seen, Fake.fails_at = [], None
    return Fake


def curve(results: Path, run_id: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / "records" / f"{run_id}.jsonl").read_text().splitlines()]


def test_a_tracker_gets_the_configuration_and_every_point_of_the_curve(
    fake: type[Fake], run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    record = run_tiny("method=lora", "track=wandb")
    first, *rest = fake.seen
    assert first[:2] == ("init", "wlora") and first[2]["id"] == record.run_id and first[2]["resume"] == "allow"
    assert rest[0] == ("start",) and rest[1][0] == "config" and rest[-1] == ("finish",)
    assert rest[1][1]["task.name"] == "story_nli" and rest[1][1]["method.rank"] == 8 and rest[1][1]["k"] == 5
    points = curve(tmp_path, record.run_id)
    assert [(step, values.get("loss"), values.get("metrics/accuracy")) for _, step, values in rest[2:-1]] == [
        (point["step"], point.get("loss"), point.get("metrics", {}).get("accuracy")) for point in points
    ]


@pytest.mark.parametrize("fails_at", ["init", "start", "config", "log", "finish"])
def test_a_broken_tracker_is_told_once_and_changes_nothing(
    fails_at: str, fake: type[Fake], run_tiny: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plain = run_tiny("method=lora", results=tmp_path / "plain")
    capsys.readouterr()
    fake.fails_at = fails_at
    record = run_tiny("method=lora", "track=wandb", results=tmp_path / "tracked")
    told = capsys.readouterr().out
    assert told.count("the tracker failed") == 1
    assert "(ConnectionError: no answer from the server); the run continues" in told
    assert [entry[0] for entry in fake.seen].count(fails_at) == 1, "and it gets nothing more"
    assert (record.status, record.run_id, record.metrics) == ("success", plain.run_id, plain.metrics)
    assert curve(tmp_path / "tracked", record.run_id) == curve(tmp_path / "plain", plain.run_id)


def test_a_run_that_fails_closes_its_tracker(fake: type[Fake], run_tiny: Callable[..., Any]) -> None:
    from wlora.training.losses import Diverged

    with pytest.raises(Diverged):
        run_tiny("method=lora", "lr=1e30", "track=wandb", "train.max_grad_norm=1e30")
    assert fake.seen[-1] == ("finish",)


def test_tensorboard_holds_the_curve(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = run_tiny("method=wlora", "track=tensorboard")
    events = EventAccumulator(str(tmp_path / "tracking" / record.run_id))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(point["step"], point["loss"]) for point in curve(tmp_path, record.run_id) if "loss" in point]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]
    assert events.Scalars("metrics/accuracy")[-1].value == pytest.approx(record.metrics["accuracy"])


def test_what_is_not_installed_or_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_tracker("none")
    for name in TRACKERS:
        if name != "none":
            with pytest.raises(
                ConfigError, match=rf"track={name}: .* is not installed\nway out: pip install 'wlora\[{name}\]'"
            ):
                require_tracker(name)
    with pytest.raises(ConfigError, match="track=comet: allowed is none | tensorboard"):
        compose(*TINY, "track=comet")


def test_every_tracker_has_an_extra() -> None:
    from tests.conftest import ROOT

    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{name} = [" in project for name in PACKAGES) and {"none", *PACKAGES} == set(TRACKERS)


def test_flat_values_are_what_every_tracker_takes() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": True, "g": "x"}
    assert flatten(nested) == {"a.b": 1, "a.c.d": "None", "e": "[1, 2]", "f": True, "g": "x"}
