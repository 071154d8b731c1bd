"""How learning rates and warm-up are chosen among recorded runs, and which runs are then reported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import RunMain, compose
from tests.support.synthetic import make_record, watch_loads
from wlora.analysis.study import Point, select
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tuning import Choice, choose_point, fill_tuned
from wlora.errors import ConfigError
from wlora.storage.locks import RunLock
from wlora.storage.records import RecordStore


def grid(results: Path, *words: str, task: str = "sst2", **scores: float) -> None:
    """Record runs at seed 0, one per `lr_XeY=score`."""
    for name, score in scores.items():
        make_record(results, f"task={task}", f"lr={name.removeprefix('lr_').replace('m', '-')}", *words, metrics=score)


def tuned(results: Path, *words: str) -> tuple[float, int | None]:
    config = compose("model=minilm", "task.path=data", "task=sst2", f"results_dir={results}", *words)
    fill_tuned(config, task_data="d", model_data="m")
    return config.lr, config.warmup


def seeds_reported(results: Path) -> list[int]:
    runs = read_runs(results)
    choice = choose_point(runs)
    assert choice is not None
    return [run.seed for run in choice.reported(runs)]


def test_the_point_is_chosen_on_the_seed_with_most_points(tmp_path: Path) -> None:
    for lr, score in (("1e-4", 0.6), ("1e-3", 0.8), ("1e-2", 0.7)):
        make_record(tmp_path, "task=sst2", f"lr={lr}", "seed=3", metrics=score)
    # Another seed did better at another rate, but was not tuned on.
    make_record(tmp_path, "task=sst2", "lr=1e-2", "seed=0", metrics=0.9)
    choice = choose_point(read_runs(tmp_path))
    assert choice is not None and (choice.point, choice.seed, choice.compared) == (Point(1e-3), 3, 3)


def test_ties_go_to_the_lower_rate_and_diverged_runs_count_as_compared(tmp_path: Path) -> None:
    grid(tmp_path, lr_1em3=0.7, lr_1em4=0.7)
    make_record(tmp_path, "task=sst2", "lr=1.0", status="diverged")
    choice = choose_point(read_runs(tmp_path))
    assert choice is not None and choice.point[0] == 1e-4 and choice.compared == 3
    assert choose_point([run for run in read_runs(tmp_path) if run.status == "diverged"]) is None


def test_a_seed_on_which_every_run_diverged_is_not_the_tuning_seed(tmp_path: Path) -> None:
    for seed in range(3):
        make_record(tmp_path, "task=sst2", "lr=1e-3", f"seed={seed}", status="success" if seed else "diverged")
    assert seeds_reported(tmp_path) == [0, 1, 2]


def test_a_tuning_seed_above_the_reported_ones_is_not_reported(tmp_path: Path) -> None:
    for lr, score in (("1e-3", 0.8), ("3e-3", 0.7)):
        make_record(tmp_path, "task=sst2", f"lr={lr}", "seed=100", metrics=score)
    assert seeds_reported(tmp_path) == [100], "alone it is all there is"
    for seed in range(3):
        make_record(tmp_path, "task=sst2", "lr=1e-3", f"seed={seed}", metrics=0.6)
    assert seeds_reported(tmp_path) == [0, 1, 2]
    # The other seeds have run over the whole grid, too, and liked another rate.
    for seed in range(3):
        make_record(tmp_path, "task=sst2", "lr=3e-3", f"seed={seed}", metrics=0.9)
    assert seeds_reported(tmp_path) == [0, 1, 2]
    # Nor do points that only they have run at decide.
    for warmup in (1, 2):
        make_record(tmp_path, "task=sst2", "lr=3e-3", f"warmup={warmup}", "seed=0", metrics=0.9)
    choice = choose_point(read_runs(tmp_path))
    assert choice is not None and (choice.seed, choice.point.lr) == (100, 1e-3)
    assert seeds_reported(tmp_path) == [0, 1, 2]
    make_record(tmp_path, "task=sst2", "lr=1e-3", "seed=1234", metrics=0.6)
    assert seeds_reported(tmp_path) == [0, 1, 2, 1234]


@pytest.mark.parametrize("tuning", [0, 1])
def test_a_tuning_seed_among_the_reported_ones_is_reported(tuning: int, tmp_path: Path) -> None:
    make_record(tmp_path, "task=sst2", "lr=3e-3", f"seed={tuning}", metrics=0.1)
    for seed in range(3):
        make_record(tmp_path, "task=sst2", "lr=1e-3", f"seed={seed}")
    assert seeds_reported(tmp_path) == [0, 1, 2]


def test_folds_of_the_tuning_seed_are_compared_by_their_mean_and_not_reported(tmp_path: Path) -> None:
    for fold, (low, high) in enumerate(((0.9, 0.5), (0.4, 0.6), (0.4, 0.7))):
        for lr, score in (("1e-3", low), ("3e-3", high)):
            words = ("task=sst2", f"lr={lr}", "task.validation='folds=3'", f"task.fold={fold}")
            make_record(tmp_path, *words, "seed=100", metrics=score)
    for seed in range(2):
        for fold in range(3):
            words = ("task=sst2", "lr=3e-3", "task.validation='folds=3'", f"task.fold={fold}", f"seed={seed}")
            make_record(tmp_path, *words, metrics=0.6)
    choice = choose_point(read_runs(tmp_path))
    assert choice is not None and (choice.point.lr, choice.seed) == (3e-3, 100), "fold 0 alone liked 1e-3"
    assert seeds_reported(tmp_path) == [0, 1, 2, 1000, 1001, 1002]


def test_rates_are_tuned_on_runs_of_the_requested_precision(tmp_path: Path) -> None:
    scores = {"bf16": {"1e-3": 0.5, "3e-3": 0.9}, "fp32": {"1e-3": 0.8, "3e-3": 0.6, "1e-2": 0.7}}
    for precision, by_rate in scores.items():
        for lr, score in by_rate.items():
            words = ("model=minilm", "task=sst2", f"lr={lr}", "seed=100", f"precision={precision}")
            make_record(tmp_path, *words, metrics=score, precision=precision)
    for precision, expected in (("bf16", 3e-3), ("fp32", 1e-3), ("auto", 1e-3), ("fp16", 1e-3)):
        words = ("model=minilm", "task.path=data", "task=sst2", "lr=tuned", f"precision={precision}")
        config = compose(*words, f"results_dir={tmp_path}")
        choice = fill_tuned(config, task_data="d", model_data="m")
        assert choice is not None and (config.lr, choice.compared) == (
            expected,
            len(scores["bf16" if expected == 3e-3 else "fp32"]),
        )


def test_seeds_of_one_point_are_all_reported(tmp_path: Path) -> None:
    for seed in (99, 100):
        make_record(tmp_path, "task=sst2", f"seed={seed}")
    assert seeds_reported(tmp_path) == [99, 100]


def test_a_choice_at_the_edge_of_the_grid_says_so(tmp_path: Path) -> None:
    points = (Point(1e-4, 5), Point(1e-3, 5), Point(1e-2, 5, 1e-3))
    assert Choice(points[1], 0, points).edges() == {}
    assert Choice(points[0], 0, points).describe(["lr", "warmup"]) == "lr=0.0001 (the smallest tried) warmup=5"
    assert Choice(points[2], 0, points).edges() == {"lr": "largest"}, "one value of head_lr has no edge"


def test_the_rate_of_the_head_is_tuned_beside_the_others(tmp_path: Path) -> None:
    for head_lr, score in ((1e-2, 0.9), (1e-3, 0.7)):
        make_record(tmp_path, "task=sst2", "lr=1e-4", f"head_lr={head_lr}", metrics=score)
    words = ("model=minilm", "task.path=data", "task=sst2", "lr=1e-4", "head_lr=tuned")
    config = compose(*words, f"results_dir={tmp_path}")
    choice = fill_tuned(config, task_data="d", model_data="m")
    assert choice is not None and config.head_lr == 1e-2 and choice.edges() == {"head_lr": "largest"}
    assert choice.point.columns() == {"lr": 1e-4, "warmup": None, "head_lr": 1e-2}


@pytest.mark.parametrize(("words", "waits"), [(["seed=100"], True), (["seed=5"], False), (["seed=100", "lr=1e-3"], False)])
def test_tuned_waits_for_runs_of_other_processes_that_may_change_the_choice(
    words: list[str], waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for lr, score in (("1e-4", 0.5), ("1e-3", 0.7)):
        make_record(tmp_path, "task=sst2", f"lr={lr}", "seed=100", metrics=score)
    make_record(tmp_path, "task=sst2", "lr=3e-2", "seed=100", status="running", name="killed")
    words = ["task=sst2", "lr=1e-2", "warmup=7", *words]
    running = make_record(tmp_path, *words, status="running")
    lock, asleep = RunLock(tmp_path, running.run_id), list[float]()

    def finish(seconds: float) -> None:
        asleep.append(seconds)
        make_record(tmp_path, *words, metrics=0.9)
        lock.release()

    monkeypatch.setattr("wlora.analysis.tuning.time.sleep", finish)
    assert lock.acquire()
    try:
        assert tuned(tmp_path, "lr=tuned", "dry_run=true") == (1e-3, None) and not asleep
        told = "is not known yet" in capsys.readouterr().out
        assert tuned(tmp_path, "lr=tuned") == (1e-2 if waits else 1e-3, None)
    finally:
        lock.release()
    waited = f"lr=tuned: waiting, because process {os.getpid()} on " in capsys.readouterr().out
    assert told == waited == bool(asleep) == waits, "runs on other seeds and with the chosen rate do not change the choice"


def test_tuned_waits_while_a_run_without_a_record_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid(tmp_path, lr_1em4=0.5, lr_1em3=0.7)
    lock = RunLock(tmp_path, "unknown")
    monkeypatch.setattr("wlora.analysis.tuning.time.sleep", lambda _: lock.release())
    assert lock.acquire() and tuned(tmp_path, "lr=tuned") == (1e-3, None) and not lock.is_held()


def test_own_rows_are_tuned_by_own_rows(tmp_path: Path) -> None:
    own = "task.labels=[no,yes]"
    grid(tmp_path, "method=lora", lr_1em4=0.9, lr_1em3=0.5)
    grid(tmp_path, "method=lora", own, lr_1em4=0.5, lr_1em3=0.9)
    assert tuned(tmp_path, "method=lora", "lr=tuned")[0] == 1e-4
    assert tuned(tmp_path, "method=lora", "lr=tuned", own)[0] == 1e-3
    assert {run.task for run in select(read_runs(tmp_path), {"task": "sst2_own"})} == {"sst2_own"}


def test_tuned_takes_the_best_recorded_values_of_the_same_setting(tmp_path: Path) -> None:
    grid(tmp_path, "method=lora", "warmup=5", lr_1em4=0.5, lr_1em3=0.9)
    grid(tmp_path, "method=lora", "warmup=7", lr_1em3=0.8)
    grid(tmp_path, "method=lora", "rank=4", lr_2em2=0.99)
    grid(tmp_path, "method=wlora", lr_3em2=0.99)
    assert tuned(tmp_path, "method=lora", "lr=tuned", "warmup=tuned", "seed=4") == (1e-3, 5)
    assert tuned(tmp_path, "method=lora", "lr=tuned", "warmup=7") == (1e-3, 7)
    assert tuned(tmp_path, "method=lora", "rank=4", "lr=tuned") == (2e-2, None)
    assert tuned(tmp_path, "method=lora", "lr=0.5") == (0.5, None)


def test_tuned_can_be_decided_by_another_task(tmp_path: Path) -> None:
    grid(tmp_path, "method=wlora", "k=5", "task.epochs=1", lr_1em4=0.5, lr_1em3=0.9)
    words = ("method=wlora", "k=5", "task=mrpc", "lr=tuned")
    assert tuned(tmp_path, *words, "tune_on=sst2")[0] == 1e-3
    with pytest.raises(ConfigError, match=r"lr=tuned: .* no finished run of method=wlora .* task=mrpc\nway out"):
        tuned(tmp_path, *words)
    with pytest.raises(ConfigError, match="no finished run"):
        tuned(tmp_path, "method=wlora", "k=3", "task=mrpc", "lr=tuned", "tune_on=sst2")
    grid(tmp_path, "method=wlora", "k=5", "task.epochs=2", lr_1em4=0.9)
    with pytest.raises(ConfigError, match=r"different settings \(task.epochs: 1.0 \| 2.0\)"):
        tuned(tmp_path, *words, "tune_on=sst2")


def test_tuning_without_something_to_tune_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tune_on=sst2"):
        tuned(tmp_path, "tune_on=sst2")
    with pytest.raises(ConfigError, match="lr=tuned"):
        tuned(tmp_path / "none", "lr=tuned")


@pytest.mark.parametrize("word", ["lr=best", "lr=0", "lr=null", "lr=true", "warmup=best", "warmup=1.5", "warmup=-1"])
def test_other_words_than_tuned_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="or tuned"):
        compose(word)


def test_a_whole_number_is_a_rate_like_any_other() -> None:
    assert compose("lr=1").lr == 1.0 and isinstance(compose("lr=1").lr, float)
    assert compose("lr=tuned", "warmup=tuned").warmup == "tuned"


def test_the_entry_point_tunes(tmp_path: Path, run_main: RunMain) -> None:
    words = ["task=story_nli", "model=tiny_bert", "task.max_train_rows=32", "task.max_eval_rows=8", "task.epochs=4"]
    words += ["task.batch_size=8", "method=probe", f"results_dir={tmp_path}"]
    code, _, error = run_main(*words, "lr=tuned")
    assert code == 2 and error.startswith("error: lr=tuned: ") and len(error.splitlines()) == 2
    assert run_main("-m", *words, "lr=1e-4,1e-2")[0] == 0
    code, out, _ = run_main("-m", *words, "lr=tuned", "seed=0,1")
    assert code == 0 and "best of 2 on story_nli seed=0" in out
    assert "is done" in out and len(read_runs(tmp_path)) == 3


def test_tuned_reads_only_the_records_of_its_task_and_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wlora.storage.index.UNINDEXED", 3)
    read = watch_loads(monkeypatch)

    def tuned() -> tuple[float, int]:
        read.clear()
        for file in (tmp_path / "records").glob("*.json"):
            os.utime(file, (1e9, 1e9))  # long ago: a file that has just changed may change again, and is not entered
        config = compose("model=minilm", "task.path=data", "task=sst2", "method=lora", "lr=tuned", f"results_dir={tmp_path}")
        fill_tuned(config, task_data="d", model_data="m")
        return config.lr, len(read)

    make_record(tmp_path, "task=sst2", "method=lora", "lr=1e-4", metrics=0.7)
    assert tuned() == (1e-4, 1) and not (tmp_path / "records" / ".index").exists()
    others = [make_record(tmp_path, "task=rte", "method=lora", f"seed={seed}") for seed in range(4)]
    assert [tuned(), tuned()] == [(1e-4, 5), (1e-4, 0)]
    make_record(tmp_path, "task=sst2", "method=lora", "lr=1e-3", metrics=0.8)
    assert [tuned(), tuned()] == [(1e-3, 1), (1e-3, 1)]
    # What stands in the index holds for the file that it was made from, and for no other.
    path = RecordStore(tmp_path).path(others[0].run_id)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ConfigError, match=f"record {path} is damaged"):
        tuned()
    path.unlink()
    for content in ("", "{", '{"x": 1}'):
        (tmp_path / "records" / ".index").write_text(content)
        assert [tuned(), tuned()] == [(1e-3, 5), (1e-3, 0)]
