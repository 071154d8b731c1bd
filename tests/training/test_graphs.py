"""Recorded passes (`train.compile=graphs`) train as others do: with a tape of operations in the place of CUDA graphs.

The tape (`tests/support/tape.py`) keeps what a CUDA graph keeps: the tensors and what Python decided. So a stale recording,
a buffer that is not filled, or gradients that are not accumulated give other numbers here, too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import TINY, compose
from tests.support.tape import Tape
from wlora.errors import RunFault
from wlora.experiment import run as experiment
from wlora.experiment.packed import why_alone
from wlora.storage.records import Record
from wlora.tasks.class_weights import class_losses
from wlora.training import batch_growth, graphs
from wlora.training.graphs import Buckets, Graphs, bucket, settle_graphs
from wlora.training.prefetch import Prefetcher

CPU = torch.device("cpu")
STILL = ["dropout=0", "+model.architecture.hidden_dropout_prob=0", "+model.architecture.attention_probs_dropout_prob=0"]
BART = ["model=tiny_bart", "dropout=0", "+model.architecture.dropout=0"]
DEBERTA = ["model=tiny_deberta", *STILL]
RunTiny = Callable[..., Record]


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> type[Tape]:
    """Let this CPU have graphs, of lengths that are close together, so that tiny texts have several."""
    monkeypatch.setattr(graphs, "has_graphs", lambda device: True)
    monkeypatch.setattr(graphs, "CudaRecorder", Tape)
    monkeypatch.setattr(graphs, "bucket", lambda length: -(-length // 3) * 3)
    monkeypatch.setattr(Tape, "made", 0)
    return Tape


def both(run_tiny: RunTiny, results: Path, *words: str) -> tuple[Record, Record]:
    """Run the same twice: without recordings and with them."""
    words = ("precision=fp32", *words)
    eager = run_tiny(*words, results=results / "off")
    return eager, run_tiny(*words, "train.compile=graphs", results=results / "graphs")


def check_equal(results: Path, eager: Record, recorded: Record, tolerance: float = 1e-6) -> None:
    """Losses, scores, events and trained weights are the same."""
    assert eager.run_id == recorded.run_id and recorded.config["train"]["compile"] == "graphs"
    curves = []
    for kind in ("off", "graphs"):
        lines = (results / kind / "records" / f"{eager.run_id}.jsonl").read_text().splitlines()
        curves.append([point["loss"] for point in map(json.loads, lines) if "loss" in point])
    assert curves[1] == pytest.approx(curves[0], abs=tolerance) and len(curves[0]) > 1
    assert recorded.metrics == pytest.approx(eager.metrics, abs=tolerance)
    for event, other in zip(eager.events, recorded.events, strict=True):
        assert (event["step"], event["kind"], event.get("kept")) == (other["step"], other["kind"], other.get("kept"))
    first, second = (
        load_file(results / kind / "adapters" / eager.run_id / "adapter_model.safetensors") for kind in ("off", "graphs")
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=10 * tolerance, rtol=1e-4, msg=name)


RUNS = {
    "a cut": [*DEBERTA, "method=wlora", "k=2", "method.select_steps=8"],
    "ranks that grow": [*DEBERTA, "method=wlora_plus", "rank=4"],
    "micro-batches, and a smaller last one": [
        *(*DEBERTA, "method=rlora", "k=2", "task.batch_size=5", "train.accumulation_steps=3", "method.select_steps=3"),
    ],
    "stored states": [
        *(*DEBERTA, "method=wlora_depth", "k=2", "method.depth_cost=0.5", "method.select_steps=4"),
        *("train.prefix_cache=memory", "train.prefix_cache_dtype=fp32"),
    ],
    "masks that are looked at": ["model=tiny_bert", *STILL, "method=wlora", "k=2"],
    "classes that weigh more": [*DEBERTA, "method=lora", "task.class_weights=balanced"],
    "a decoder": ["task=story_summary", *BART, "method=wlora", "k=2", "task.max_eval_rows=4", "task.max_train_rows=64"],
    "lengths that matter": ["task=story_qa", *DEBERTA, "method=lora"],
}


LONG = {"a decoder"}  # 10 s


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=name, marks=[pytest.mark.slow] * (name in LONG)) for name, words in RUNS.items()]
)
def test_recorded_runs_equal_eager_ones(words: list[str], run_tiny: RunTiny, tape: type[Tape], tmp_path: Path) -> None:
    eager, recorded = both(run_tiny, tmp_path, *words)
    check_equal(tmp_path, eager, recorded)
    passes = recorded.memory["graph_passes"]
    assert recorded.memory["graphs"] >= 2 and passes > recorded.memory["graphs"] and "graphs" not in eager.memory
    # Each structural change makes all recordings anew.
    assert tape.made == 1 + len({event["step"] for event in recorded.events})


@pytest.mark.slow
def test_micro_batches_that_are_divided_are_recorded_anew(
    run_tiny: RunTiny, tape: type[Tape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in a step, some of whose micro-batches have been replayed."""
    before, taken = Prefetcher.take, []

    def take(self: Prefetcher, rows: list[int]) -> Any:
        taken.append(len(rows))
        if len(taken) > 10 and len(rows) > 4:
            raise torch.OutOfMemoryError("as on a small GPU")
        return before(self, rows)

    words = [*DEBERTA, "method=lora", "train.accumulation_steps=4"]
    whole = run_tiny(*words, "precision=fp32", results=tmp_path / "off")
    monkeypatch.setattr(Prefetcher, "take", take)
    parts = run_tiny(*words, "precision=fp32", "train.compile=graphs", results=tmp_path / "graphs")
    assert parts.events == [{"step": 3, "kind": "out_of_memory", "rows_at_once": 4}]
    check_equal(tmp_path, dataclasses.replace(whole, events=parts.events), parts)
    assert tape.made == 2 and parts.memory["graph_passes"] > 16


def test_larger_micro_batches_are_recorded_anew(
    run_tiny: RunTiny, tape: type[Tape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_growth, "larger_is_faster", lambda device: True)
    words = [*DEBERTA, "method=wlora_depth", "k=1", "method.depth_cost=1", "method.select_steps=3", "train.grow_batch=micro"]
    eager, recorded = both(run_tiny, tmp_path, *words, "train.accumulation_steps=4", "task.epochs=6")
    check_equal(tmp_path, eager, recorded)
    assert [event["kind"] for event in recorded.events] == ["cut", "grow_batch"]
    assert recorded.events[-1]["growth"] > 1 and tape.made >= 2 and recorded.memory["graph_passes"] > 0


def test_a_resumed_run_records_again(run_tiny: RunTiny, tape: type[Tape], tmp_path: Path) -> None:
    words = [*DEBERTA, "method=wlora", "k=2", "method.select_steps=8"]
    eager = run_tiny(*words, "precision=fp32", results=tmp_path / "off")
    for until in ("0.5", "1"):
        words = [*words, f"train.until={until}"]
        with experiment.stopping():
            recorded = run_tiny(*words, "precision=fp32", "train.compile=graphs", results=tmp_path / "graphs")
    check_equal(tmp_path, eager, recorded)
    assert recorded.resumed_at == [16] and tape.made == 3


def test_float16_gradients_are_scaled_in_recordings(run_tiny: RunTiny, tape: type[Tape], tmp_path: Path) -> None:
    words = [*DEBERTA, "method=wlora", "k=2", "precision=fp16"]
    eager, recorded = both(run_tiny, tmp_path, *words)
    check_equal(tmp_path, eager, recorded, tolerance=2e-3)  # padding changes sums in float16


def test_dropout_is_drawn_anew_in_every_replay_and_repeats_with_the_seed() -> None:
    weight = nn.Parameter(torch.ones(64))

    def backward(given: dict[str, Tensor]) -> Tensor:
        loss = F.dropout(given["x"] * weight, 0.5).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def losses() -> list[float]:
        torch.manual_seed(0)
        passes = Graphs(Tape)
        found = []
        for _ in range(5):
            weight.grad = None
            passes.begin(0)
            found.append(float(passes.run({"x": torch.arange(64.0)}, backward, lambda: [weight])))
        assert passes.facts() == {"graphs": 1, "graph_passes": 3}
        return found

    first = losses()
    assert len(set(first)) == 5 and first == losses()


def test_a_recording_keeps_what_it_reads_and_frees_what_it_makes() -> None:
    """The table of a cache may leave it; activations are not kept."""
    cache = {"table": torch.full((4,), 2.0)}
    weight, made = nn.Parameter(torch.ones(4)), []

    def backward(given: dict[str, Tensor]) -> Tensor:
        hidden = given["x"] * weight
        made.append(hidden.untyped_storage()._cdata)
        loss = (hidden.sin() * cache["table"]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    passes = Graphs(Tape)
    for _ in range(2):
        passes.begin(0)
        passes.run({"x": torch.ones(4)}, backward, lambda: [weight])
    (recording,) = passes._recordings.values()
    storages = {tensor.untyped_storage()._cdata for tensor in recording.kept}
    assert weight.grad is not None
    expected = [recording.inputs["x"], cache["table"], weight, weight.grad]
    assert storages == {tensor.untyped_storage()._cdata for tensor in expected} and made[-1] not in storages


def test_gradients_that_the_loss_does_not_reach_stay_none_and_others_accumulate() -> None:
    weight, idle, passes = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), Graphs(Tape)

    def backward(given: dict[str, Tensor]) -> Tensor:
        loss = (given["x"] * weight).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    for step in range(3):
        weight.grad = None
        passes.begin(0)
        for x in (1.0, 2.0, 3.0):
            loss = passes.run({"x": torch.full((2,), x)}, backward, lambda: [weight, idle])
            assert float(loss) == 2 * x
        assert weight.grad is not None and weight.grad.tolist() == [6.0, 6.0] and idle.grad is None, step
    assert passes.facts() == {"graphs": 1, "graph_passes": 7}


def test_no_more_than_so_many_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    weight, passes = nn.Parameter(torch.ones(1)), Graphs(Tape)

    def backward(given: dict[str, Tensor]) -> Tensor:
        loss = (given["x"] * weight).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    passes.begin(0)
    for length in (1, 2, 3) * 3:
        passes.run({"x": torch.ones(length)}, backward, lambda: [weight])
    assert passes.facts() == {"graphs": 2, "graph_passes": 2}
    assert weight.grad is not None and float(weight.grad) == 18


def test_a_model_that_reads_values_is_told_in_one_line(
    run_tiny: RunTiny, tape: type[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wlora.adapters.layer import AdaptedLinear

    before = AdaptedLinear.forward

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        assert float(x.detach().sum()) < 1e9
        return before(self, x, *args, **options)

    monkeypatch.setattr(AdaptedLinear, "forward", forward)
    with pytest.raises(
        RunFault, match=r"^train.compile=graphs cannot record this model \(RuntimeError: operation not "
    ) as told:
        run_tiny(*DEBERTA, "method=lora", "train.compile=graphs")
    assert str(told.value).endswith("train.compile=off does without") and "\n" not in str(told.value)


OFF = {
    "on this cpu, which has no CUDA graphs": (["method=lora"], CPU, 1),
    "with 2 processes": (["method=lora"], torch.device("cuda"), 2),
    "with method=adalora, which acts within the backward pass or has adapters of its own": (
        *(["method=adalora"], torch.device("cuda"), 1),
    ),
    "with a quantised base": (["method=lora", "model=llama3_8b", "model.quantization=nf4"], torch.device("cuda"), 1),
    "with train.gradient_checkpointing=true": (
        *(["method=lora", "train.gradient_checkpointing=true"], torch.device("cuda"), 1),
    ),
    "with model=tiny_bart, which skips layers at random": (
        ["task=story_summary", "model=tiny_bart", "+model.architecture.encoder_layerdrop=0.1", "method=lora"],
        *(torch.device("cuda"), 1),
    ),
}


@pytest.mark.parametrize("reason", OFF)
def test_where_there_are_none_one_line_says_so(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, device, processes = OFF[reason]
    config = compose(*TINY, "train.compile=graphs", *words)
    assert [settle_graphs(config, device, processes).train.compile for _ in range(2)] == ["off", "off"]
    assert capsys.readouterr().out == f"notice: train.compile=graphs is off {reason}\n"
    assert settle_graphs(compose(*TINY, "method=wlora", "train.compile=graphs"), torch.device("cuda"), 1).train.compile == (
        "graphs"
    )


def test_on_a_cpu_a_run_is_the_same_with_the_key(run_tiny: RunTiny, tmp_path: Path) -> None:
    eager, asked = both(run_tiny, tmp_path, "method=lora", "train.max_steps=4")
    assert asked.metrics == eager.metrics and asked.run_id == eager.run_id and asked.config["train"]["compile"] == "off"


def test_runs_with_graphs_train_outside_of_packs() -> None:
    config = compose(*TINY, "method=lora", "train.compile=graphs")
    assert why_alone(config) == "train.compile=graphs" and why_alone(compose(*TINY, "method=lora")) is None


def test_lengths_are_few_and_little_is_padded() -> None:
    assert sorted({bucket(length) for length in range(1, 129)}) == [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert len({bucket(length) for length in range(1, 513)}) == 20
    assert all(length <= bucket(length) < max(length + 8, 1.25 * length) for length in range(1, 2000))


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_task_pads_on_its_own_side_up_to_a_bucket_but_not_beyond_the_longest_row(side: str) -> None:
    import pyarrow as pa

    from wlora.data.features import Features, pad

    class Tokenizer:
        pad_token_id, pad_token_type_id, padding_side = 7, 0, side

    lengths = [3, 9, 12]
    column = pa.array([[1] * length for length in lengths], pa.list_(pa.int32()))
    labels = pa.array([[1, 0]] * 3, pa.list_(pa.int32()))  # as of a task with several classes per row: not padded
    features = Features([pa.table({"input_ids": column, "labels": labels, "length": pa.array(lengths)})])
    rounded = Buckets(features, "sequence_classification", lambda rows: pad(rows, Tokenizer()))  # type: ignore[arg-type]
    assert rounded.collate([0])["input_ids"].tolist() == [[1, 1, 1, *[7] * 5] if side == "right" else [*[7] * 5, 1, 1, 1]]
    assert rounded.collate([0, 1])["input_ids"].shape == (2, 12)
    seen: list[Any] = []
    Buckets(features, "sequence_classification", lambda rows: seen.extend(rows) or {}).collate([0])
    assert len(seen[-1]["labels"]) == 2


def test_weights_of_classes_are_made_once() -> None:
    """In a recording they would be copied from memory of the host that is gone."""
    from wlora.tasks import class_weights

    class_weights._as_tensor.cache_clear()
    for _ in range(3):
        class_losses(torch.zeros(2, 2), torch.tensor([0, 1]), [0.5, 1.5])
    assert class_weights._as_tensor.cache_info().misses == 1
