from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wlora.config import restore_config
from wlora.errors import ConfigError
from wlora.study import Point, flatten, read_runs, read_value, read_words, require_one_setting, select
from wlora.tuning import choose_point, fill_tuned

from .conftest import ROOT, compose, run_cli
from .synthetic import make_record


def grid(results: Path, *words: str, task: str = "sst2", **scores: float) -> None:
    """Record runs at seed 0, one per `lr_XeY=score`."""
    for name, score in scores.items():
        make_record(results, f"task={task}", f"lr={name.removeprefix('lr_').replace('m', '-')}", *words, metrics=score)


def test_a_restored_configuration_is_the_recorded_one(tmp_path: Path) -> None:
    record = make_record(tmp_path, "task=rte", "method=wlora", "k=3")
    again = restore_config({**record.config, "dropped": 1})
    assert again.task.name == "rte" and again.method["k"] == 3 and again.model.name == "minilm"
    assert restore_config({key: value for key, value in record.config.items() if key != "tune_on"}).tune_on is None


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


def tuned(results: Path, *words: str) -> tuple[float, int | None]:
    config = compose("model=minilm", "task.path=data", "task=sst2", f"results_dir={results}", *words)
    fill_tuned(config, task_data="d", model_data="m")
    return config.lr, config.warmup


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


def test_runs_of_different_settings_are_refused_with_the_way_to_choose(tmp_path: Path) -> None:
    for epochs in (1, 2):
        make_record(tmp_path, "task=sst2", f"task.epochs={epochs}", f"seed={epochs}")
    with pytest.raises(ConfigError, match=r"here: runs of different settings \(task.epochs: 1.0 \| 2.0\)\nway out: .*=1.0"):
        require_one_setting(read_runs(tmp_path), "here")
    require_one_setting(read_runs(tmp_path), "here", part="method.")
    require_one_setting(read_runs(tmp_path), "here", but="task.")
    require_one_setting(select(read_runs(tmp_path), {"task.epochs": "1"}), "here")


def test_selection_by_any_key(tmp_path: Path) -> None:
    make_record(tmp_path, "task=sst2", "method=wlora", "k=3", "lr=5e-4")
    make_record(tmp_path, "task=sst2", "method=wlora", "k=5", "lr=5e-3")
    make_record(tmp_path, "task=mrpc", "method=full")
    runs = read_runs(tmp_path)
    for filters, number in [
        ({"task": "sst2"}, 2),
        ({"task": "sst2,mrpc"}, 3),
        ({"lr": "5e-3"}, 1),
        ({"method.k": "3"}, 2),  # full has no k: it passes
        ({"method": "wlora", "method.k": "3"}, 1),
        ({"warmup": "null"}, 3),
        ({"seed": "1"}, 0),
    ]:
        assert len(select(runs, filters)) == number, filters
    with pytest.raises(ConfigError, match="did you mean task.epochs"):
        select(runs, {"task.epoch": "1"})
    assert select([], {"whatever": "1"}) == []


def test_words_of_the_command_line() -> None:
    assert [read_value(word) for word in ("null", "true", "3", "5e-4", "qkv")] == [None, True, 3, 5e-4, "qkv"]
    assert read_words(["1", "a=b=c", "model=x"], {"model": None, "n": "0"}) == (
        ["1"],
        {"model": "x", "n": "0"},
        {"a": "b=c"},
    )
    with pytest.raises(ConfigError, match="key=value"):
        read_words(["task="], {})
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}


def test_unreadable_records_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_record(tmp_path, "task=sst2")
    (tmp_path / "records" / "torn.json").write_text("{")
    assert len(read_runs(tmp_path)) == 1
    told = capsys.readouterr().err
    assert told == f"notice: record {tmp_path}/records/torn.json is damaged: it is no whole JSON; it is left out\n"


def test_reading_never_imports_torch() -> None:
    code = "import sys, wlora.study, wlora.tables.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_entry_point_tunes(tmp_path: Path) -> None:
    words = ["task=story_nli", "model=tiny_bert", "task.max_train_rows=32", "task.max_eval_rows=8", "task.epochs=4"]
    words += ["task.batch_size=8", "method=probe", f"results_dir={tmp_path}"]
    refused = run_cli(*words, "lr=tuned")
    assert (
        refused.returncode == 2 and refused.stderr.startswith("error: lr=tuned: ") and len(refused.stderr.splitlines()) == 2
    )
    assert run_cli("-m", *words, "lr=1e-4,1e-2").returncode == 0
    done = run_cli("-m", *words, "lr=tuned", "seed=0,1")
    assert done.returncode == 0 and "best of 2 on story_nli seed=0" in done.stdout
    assert "is done" in done.stdout and len(read_runs(tmp_path)) == 3
