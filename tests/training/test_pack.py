"""Packed training: every run of a pack has the numbers that it has alone, whatever happens to the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, compose
from wlora.errors import RunFault
from wlora.experiment import run as experiment
from wlora.experiment.packed import Entry, group, run_pack, why_alone
from wlora.storage.records import Record, RecordStore
from wlora.training import pack as packing
from wlora.training.losses import Diverged
from wlora.training.passes import Piece, plan_passes

STILL = ["dropout=0", "+model.architecture.hidden_dropout_prob=0", "+model.architecture.attention_probs_dropout_prob=0"]
EIGHT = [
    ["method=lora", "lr=3e-3"],
    ["method=wlora", "lr=3e-3", "k=3"],
    ["method=wlora_plus", "rank=4"],
    ["method=rlora", "seed=1"],
    ["method=wlora_depth", "lr=2e-3", "warmup=2"],
    ["method=lora", "rank=2", "seed=2"],
    ["method=wlora", "k=2", "seed=1", "train.max_grad_norm=0.1", "method.omega_scheduled=true"],
    ["method=wlora_plus", "seed=3", "method.schedule=halvings"],
]
Points = list[dict[str, Any]]


def together(
    runs: list[list[str]], results: Path, *words: str, size: int | None = None
) -> dict[str, Record | BaseException]:
    """Train runs in one pack; returns how each ended, by its words."""
    entries = [Entry(compose(*TINY, *words, *run, f"results_dir={results}"), ()) for run in runs]
    (chosen,) = group(entries)
    return {" ".join(runs[index]): found for index, found in run_pack(entries, chosen, size or len(runs))}


def curve(record: Record, results: Path) -> Points:
    lines = (results / "records" / f"{record.run_id}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(record: Record, results: Path) -> list[float]:
    return [point["loss"] for point in curve(record, results) if "loss" in point]


def facts(record: Record) -> Any:
    kept = [(adapter["name"], adapter["rank"]) for adapter in record.adapters]
    return kept, [(event["step"], event["kind"], event.get("kept")) for event in record.events], record.parameters


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute everything in float64."""
    before = experiment.assemble

    def assemble(*args: Any, **options: Any) -> Any:
        assembly = before(*args, **options)
        assembly.model.double()
        return assembly

    monkeypatch.setattr(experiment, "assemble", assemble)


@pytest.mark.parametrize("model", ["tiny_bert", pytest.param("tiny_deberta", marks=pytest.mark.slow)])
def test_in_float64_eight_mixed_runs_equal_their_twins_alone(model: str, double: None, tmp_path: Path) -> None:
    words = [f"model={model}", *STILL, "precision=fp32", "task.batch_size=10"]  # the last batch of an epoch is smaller
    found = together(EIGHT, tmp_path / "packed", *words)
    for run in EIGHT:
        alone = experiment.run(compose(*TINY, *words, *run, f"results_dir={tmp_path / 'alone'}"))
        packed = found[" ".join(run)]
        assert isinstance(packed, Record) and packed.status == "success"
        assert losses(packed, tmp_path / "packed") == pytest.approx(losses(alone, tmp_path / "alone"), abs=1e-8)
        assert facts(packed) == facts(alone)
        assert [a["omega"] for a in packed.adapters] == pytest.approx([a["omega"] for a in alone.adapters], abs=1e-8)
        assert packed.metrics == pytest.approx(alone.metrics, abs=1e-8)
        assert packed.run_id == alone.run_id and (len(packed.packed["with"]), alone.packed) == (7, {})


def test_in_float32_the_first_twenty_steps_agree(tmp_path: Path) -> None:
    words = [*STILL, "precision=fp32", "train.max_steps=20"]
    found = together(EIGHT, tmp_path / "packed", *words)
    for run in EIGHT:
        alone = experiment.run(compose(*TINY, *words, *run, f"results_dir={tmp_path / 'alone'}"))
        packed = found[" ".join(run)]
        assert isinstance(packed, Record)
        assert losses(packed, tmp_path / "packed") == pytest.approx(losses(alone, tmp_path / "alone"), abs=1e-5)


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("tiny_deberta", "story_nli"),
        pytest.param("tiny_bert", "story_nli", marks=pytest.mark.slow),
        pytest.param("tiny_llama", "story_nli", marks=pytest.mark.slow),
        pytest.param("tiny_bert", "story_qa", marks=pytest.mark.slow),
        pytest.param("tiny_bart", "story_summary", marks=pytest.mark.slow),
    ],
)
def test_dropout_does_not_depend_on_who_is_in_the_pack(model: str, task: str, double: None, tmp_path: Path) -> None:
    words = [f"model={model}", f"task={task}", "precision=fp32", "task.batch_size=10"]
    found = together(EIGHT[:4], tmp_path / "packed", *words)
    for run in EIGHT[:4]:
        config = compose(*TINY, *words, *run, f"results_dir={tmp_path / 'alone'}")
        alone = experiment.run(config, keyed=True)
        packed = found[" ".join(run)]
        assert isinstance(packed, Record)
        assert losses(packed, tmp_path / "packed") == pytest.approx(losses(alone, tmp_path / "alone"), abs=1e-12)
        assert facts(packed) == facts(alone)
    sequential = experiment.run(compose(*TINY, *words, *EIGHT[0], f"results_dir={tmp_path / 'sequential'}"))
    first = found[" ".join(EIGHT[0])]
    assert isinstance(first, Record)
    assert losses(sequential, tmp_path / "sequential") != pytest.approx(losses(first, tmp_path / "packed"), abs=1e-9)


def test_a_run_that_diverges_leaves_and_the_next_one_takes_its_place(
    double: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compute = packing.Pack.compute

    def poison(self: packing.Pack, requests: Any) -> Any:
        found = compute(self, requests)
        bad = [index for index, (trainer, _) in enumerate(requests) if trainer.settings.lr == 3e-3 and trainer.step == 6]
        return [c._replace(loss=c.loss * torch.nan) if index in bad else c for index, c in enumerate(found)]

    monkeypatch.setattr(packing.Pack, "compute", poison)
    runs = [["method=lora", "lr=3e-3"], ["method=wlora", "k=2"], ["method=lora", "lr=1e-4"]]
    found = together(runs, tmp_path, *STILL, "precision=fp32", size=2)
    assert isinstance(found["method=lora lr=3e-3"], Diverged)
    others = [found["method=wlora k=2"], found["method=lora lr=1e-4"]]
    assert [record.status for record in others if isinstance(record, Record)] == ["success"] * 2
    assert sorted(record.status for record in RecordStore(tmp_path)) == ["diverged", "success", "success"]
    alone = experiment.run(compose(*TINY, *STILL, "precision=fp32", *runs[2], f"results_dir={tmp_path / 'alone'}"))
    last = found["method=lora lr=1e-4"]
    assert isinstance(last, Record) and last.metrics == pytest.approx(alone.metrics, abs=1e-8)


def test_without_memory_a_pass_has_fewer_rows_and_the_numbers_stay(
    double: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [*STILL, "precision=fp32", "train.max_steps=6"]
    whole = together(EIGHT[:3], tmp_path / "whole", *words)
    run_pass, sizes = packing.Pack._run_pass, []

    def small(self: packing.Pack, members: Any, pieces: list[Piece], *rest: Any) -> Any:
        rows = sum(len(piece.rows) for piece in pieces)
        found = run_pass(self, members, pieces, *rest)  # gradients are left behind before memory is exhausted
        if rows > 5:
            raise torch.OutOfMemoryError("as on a small GPU")
        sizes.append(rows)
        return found

    monkeypatch.setattr(packing.Pack, "_run_pass", small)
    parts = together(EIGHT[:3], tmp_path / "parts", *words)
    for name, record in whole.items():
        other = parts[name]
        assert isinstance(record, Record) and isinstance(other, Record)
        assert losses(other, tmp_path / "parts") == pytest.approx(losses(record, tmp_path / "whole"), abs=1e-8)
        assert other.throughput.keys() == record.throughput.keys()
    assert 0 < max(sizes) <= 5

    def never(*given: Any) -> Any:
        raise torch.OutOfMemoryError("as on a tiny GPU")

    monkeypatch.setattr(packing.Pack, "_run_pass", never)
    ended = together(EIGHT[:2], tmp_path / "none", *words)
    assert all(isinstance(error, RunFault) and "out of memory" in str(error) for error in ended.values())
    assert {record.status for record in RecordStore(tmp_path / "none")} == {"oom"}


def test_a_run_in_a_pack_resumes_alone_and_is_the_same(
    double: None, monkeypatch: pytest.MonkeyPatch, run_tiny: Callable[..., Record], tmp_path: Path
) -> None:
    words = ["precision=fp32", "train.checkpoint_every=7"]
    whole = together(EIGHT[:2], tmp_path / "whole", *words)
    compute = packing.Pack.compute

    def stop(self: packing.Pack, requests: Any) -> Any:
        if requests[0][0].step == 16:
            raise RuntimeError("as if killed")
        return compute(self, requests)

    monkeypatch.setattr(packing.Pack, "compute", stop)
    together(EIGHT[:2], tmp_path / "stopped", *words)
    monkeypatch.setattr(packing.Pack, "compute", compute)
    resumed = experiment.run(compose(*TINY, *words, *EIGHT[1], f"results_dir={tmp_path / 'stopped'}"))
    record = whole[" ".join(EIGHT[1])]
    assert isinstance(record, Record)
    assert resumed.resumed_at == [14] and resumed.packed["with"] == record.packed["with"]
    assert resumed.metrics == pytest.approx(record.metrics, abs=1e-12) and facts(resumed) == facts(record)
    assert losses(resumed, tmp_path / "stopped") == pytest.approx(losses(record, tmp_path / "whole"), abs=1e-12)


def test_runs_of_one_pack_share_model_data_precision_and_batch_shape(tmp_path: Path) -> None:
    runs = [["method=lora"], ["method=wlora", "lr=1e-4"], ["method=lora", "task.batch_size=4"], ["method=adalora"]]
    runs += [["method=lora", "seed=3"], ["method=lora", "model=tiny_deberta"], ["method=lora", "train.prefix_cache=memory"]]
    entries = [Entry(compose(*TINY, *run, f"results_dir={tmp_path}"), ()) for run in runs]
    assert group(entries) == [[0, 1, 4], [2], [3], [5], [6]]
    assert [why_alone(entries[index].config) for index in (0, 3, 6)] == [None, "method=adalora", "train.prefix_cache=memory"]


def piece(run: int, length: int, lowest: int | None = 0, rows: int = 8) -> Piece:
    return Piece(run, list(range(rows)), length, lowest)


def test_equal_batches_are_one_pass_and_very_different_ones_are_several() -> None:
    alike = [piece(run, 20) for run in range(4)]
    assert plan_passes(alike, layers=12, device="cpu", most_rows=None) == [alike]
    mixed = [piece(0, 20), piece(1, 200), piece(2, 21), piece(3, 198), piece(4, 20, lowest=11)]
    on_cpu = plan_passes(mixed, layers=12, device="cpu", most_rows=None)
    assert sorted(sorted(p.run for p in group) for group in on_cpu) == [[0, 2], [1, 3], [4]]
    on_gpu = plan_passes(mixed, layers=12, device="cuda", most_rows=None)
    assert [sorted(p.run for p in group) for group in on_gpu] == [[0, 1, 2, 3, 4]]
    exact = plan_passes(mixed, layers=12, device="cuda", most_rows=None, padded=False)
    assert all(len({p.length for p in group}) == 1 for group in exact)


def test_bounded_passes_hold_every_row_once() -> None:
    pieces = [piece(run, 20, rows=8) for run in range(3)]
    found = plan_passes(pieces, layers=12, device="cuda", most_rows=5)
    assert all(sum(len(p.rows) for p in group) <= 5 for group in found)
    assert sorted((p.run, row) for group in found for p in group for row in p.rows) == [
        (run, row) for run in range(3) for row in range(8)
    ]
