from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.support.synthetic import make_record
from wlora.analysis import tuning
from wlora.analysis.study import Point
from wlora.cli import sweep
from wlora.cli.sweep import duration, survey
from wlora.errors import ConfigError

SETTING = ["model=minilm", "task=sst2", "method=lora,wlora", "k=5", "task.epochs=1"]


@pytest.fixture(autouse=True)
def _contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give data and weights the fingerprints of the synthetic records; read the records afresh."""
    monkeypatch.setattr(sweep, "fingerprint", lambda task: "d" if task.path else None)
    monkeypatch.setattr(sweep, "locate", lambda model: type("Source", (), {"fingerprint": "m"}))
    sweep.read_records.cache_clear()


def words(results: Path, *more: str) -> list[str]:
    return [*SETTING, f"results_dir={results}", "task.path=data", *more]


def counts(results: Path, *sweeps: list[str]) -> list[tuple[int, int]]:
    sweep.read_records.cache_clear()
    return [(len(cell.done), len(cell.wanted)) for cell in survey(sweeps)]


def test_a_grid_and_its_tuned_runs_are_one_cell_per_method(tmp_path: Path) -> None:
    grid, tuned = words(tmp_path, "lr=1e-4,1e-3,1e-2", "seed=0"), words(tmp_path, "lr=tuned", "seed=range(5)")
    # Three of the grid and four more seeds: the best of the grid is the fifth.
    assert counts(tmp_path, grid, tuned) == [(0, 7), (0, 7)]
    for lr in ("1e-4", "1e-3"):
        make_record(tmp_path, "task=sst2", "method=lora", "task.epochs=1", f"lr={lr}", metrics=0.5)
    make_record(tmp_path, "task=sst2", "method=lora", "task.epochs=1", "lr=1e-2", status="diverged")
    make_record(tmp_path, "task=sst2", "method=lora", "task.epochs=1", "lr=1e-4", "seed=3")
    make_record(tmp_path, "task=sst2", "method=lora", "task.epochs=2", "lr=1e-2")
    assert counts(tmp_path, grid, tuned) == [(4, 7), (0, 7)], "a diverged run would diverge again"


def test_rate_and_warm_up_in_turn(tmp_path: Path) -> None:
    stages = [
        words(tmp_path, "warmup=3", "seed=0", "lr=1e-4,1e-3"),
        words(tmp_path, "lr=tuned", "seed=0", "warmup=0,3,5"),
        words(tmp_path, "lr=tuned", "warmup=tuned", "seed=range(3)"),
    ]
    # 2 rates; then 2 warm-ups (3 is there already); then 2 seeds.
    assert counts(tmp_path, *stages) == [(0, 6), (0, 6)]


def test_a_preset_counts_in_what_a_cell_holds(tmp_path: Path) -> None:
    line = ["method=adalora", "task=rte", "method.preset=authors", f"results_dir={tmp_path}"]
    (cell,) = survey([line])
    assert cell.config.task.epochs == 50 and cell.wanted == {(Point(1.2e-3, 200, None), 0)}


def test_an_experiment_brings_its_grid(tmp_path: Path) -> None:
    line = ["experiment=table1", "task=rte", "method=lora", f"results_dir={tmp_path}"]
    assert counts(tmp_path, line) == [(0, 3)]
    assert counts(tmp_path, [*line, "lr=1e-3"]) == [(0, 1)]
    (cell,) = survey([line])
    assert cell.config.train.max_steps == 512 and cell.config.task.batch_size == 32 and cell.seconds is None


def test_the_time_left_comes_from_the_nearest_runs(tmp_path: Path) -> None:
    # 10 s over 50 steps of 32 rows; the sweep's runs take 5 steps: 1 s. MRPC's rows are as fast as any of the model's.
    make_record(tmp_path, "task=sst2", "method=lora", "task.epochs=9", "train.accumulation_steps=1")
    more = ["lr=1e-3", "seed=range(2)", "task.max_train_rows=160", "train.accumulation_steps=1", "task.batch_size=32"]
    assert [cell.seconds for cell in survey([words(tmp_path, *more)])] == pytest.approx([1.0, 1.0])
    slow = {"train": 80.0, "eval": 10.0, "total": 100.0}
    make_record(tmp_path, "task=sst2", "method=wlora", "k=3", "task.epochs=9", "train.accumulation_steps=1", seconds=slow)
    sweep.read_records.cache_clear()
    assert [cell.seconds for cell in survey([words(tmp_path, *more)])] == pytest.approx([1.0, 10.0])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lr=-1", "lr=-1"),
        ("rank=0", "rank=0"),
        ("metod=lora", "did you mean"),
        ("warmup=9999", "warmup=9999"),
        ("method=lora", "k=5: k is not read by method=lora"),
        ("method.preset=author", "method.preset=author: allowed is authors or null"),
    ],
)
def test_what_a_run_would_refuse_is_refused(tmp_path: Path, word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        survey([words(tmp_path, "task.max_train_rows=64", word)])


def test_the_entry_point_prints_cells_and_the_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = " ".join(words(tmp_path, "lr=1e-4,1e-3"))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{lines}\n\n{lines}\n"))
    sweep.main([])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "task=sst2 model=minilm method=lora rank=8 targets=qkv: 0 of 2 runs done, length unknown"
    assert printed[1].startswith("task=sst2 model=minilm method=wlora rank=8 k=5 targets=qkv: 0 of 2")
    assert printed[2] == "0 of 4 runs done; 0 s left on one process, not counting 4 runs of unknown length"
    for wrong in ("rank=x", "'task=rte", "--config-dir=x", "k=[1"):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{lines} {wrong}\n"))
        with pytest.raises(SystemExit) as end:
            sweep.main([])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) <= 2, error


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59, 60, 3599, 3600, 12_000)] == [
        "0 s", "59 s", "1 min", "1 h 0 min", "1 h 0 min", "3 h 20 min"
    ]  # fmt: skip


def test_hydra_composes_each_choice_of_groups_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    by_hydra = sweep._compose_by_hydra

    def noted(words: tuple[str, ...]) -> DictConfig:
        asked.append(words)
        return by_hydra(words)

    monkeypatch.setattr(sweep, "_compose_by_hydra", noted)
    sweep._compose_groups.cache_clear()
    cells = survey([words(tmp_path, "rank=range(1,7)", "train.weight_decay=0.0,0.1")])
    assert len(cells) == 24 and asked == [("model=minilm", "task=sst2", f"method={name}") for name in ("lora", "wlora")]
    cell = next(cell for cell in cells if cell.config.rank == 3 and cell.config.method["name"] == "wlora")
    assert cell.config.method["rank"] == 3 and cell.config.method["k"] == 5
    whole = by_hydra([*asked[1], "k=5", "rank=3", "+new=1", "~offline", "task.columns=[a]"])
    assert sweep._compose([*asked[1], "k=5", "rank=3", "+new=1", "~offline", "task.columns=[a]"]) == whole


@pytest.mark.parametrize(
    "sweeps",
    [
        [["rank=1", "k=2"], ["rank=4", "k=null"], ["rank=1", "k=2"]],
        [["task.max_train_rows=7"], ["task.max_train_rows=null"], ["rank=3"], ["targets=qkv@2"]],
        [["task.generation={num_beams: 3}"], ["task.generation={max_new_tokens: 2}"], ["task.columns=[a]"], ["rank=2"]],
        [["method.preset=authors"], ["method.preset=null"], ["method.preset=authors", "alpha=3"], ["alpha=3"]],
        [["+method.revision=1"], ["train.keep=3"], ["++train.keep=4"], ["rank=7"]],
    ],
)
def test_what_one_cell_sets_does_not_reach_the_next(sweeps: list[list[str]], tmp_path: Path) -> None:
    def composed(words: list[str]) -> Any:
        whole = ["task=rte", "model=minilm", "method=rlora", f"results_dir={tmp_path}", *words]
        made = sweep._compose(whole)
        sweep.apply_presets(made, whole)
        return OmegaConf.to_container(made)

    def afresh(words: list[str]) -> Any:
        sweep._shared_copy.cache_clear()
        return composed(words)

    assert [composed(words) for words in sweeps * 2] == [afresh(words) for words in sweeps * 2]


def test_cells_do_not_look_through_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(1, 9):
        make_record(tmp_path, "task=sst2", "method=lora", "task.epochs=1", f"rank={rank}")
    looked: list[dict[str, Any]] = []
    agreeing = tuning._agreeing

    def noted(setting: dict[str, Any], parts: tuple[str, ...]) -> tuning.Agreeing:
        looked.append(setting)
        return agreeing(setting, parts)

    monkeypatch.setattr(tuning, "_agreeing", noted)
    line = ["model=minilm", "task=sst2", "method=lora", "task.epochs=1", "task.path=data", f"results_dir={tmp_path}"]
    assert counts(tmp_path, [*line, "rank=range(1,17)"]) == [(1, 1)] * 8 + [(0, 1)] * 8
    assert len(looked) == 2 * 8 + 16
