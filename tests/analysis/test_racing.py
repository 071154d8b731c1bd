"""Successive halving over records: who goes on, how far, and what tables and `tuned` make of those who do not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.support.synthetic import make_record
from wlora.analysis.racing import RUNGS, Entrant, divide, judge, read_entrant, survivors, work_left
from wlora.analysis.study import Point
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tuning import choose_point
from wlora.storage.records import RecordStore
from wlora.training.run_length import step_at

TOTAL = 80


def entrant(*scores: float, ended: bool = False) -> Entrant:
    """A run of 80 steps, evaluated at the first rungs with these scores."""
    steps = [step_at(share, TOTAL) for share in (*RUNGS, 1.0)]
    return Entrant(TOTAL, tuple((step, (score, -1.0)) for step, score in zip(steps, scores, strict=False)), ended)


def play(finals: list[float]) -> tuple[list[int], float]:
    """Race runs whose score is the same at every evaluation; returns those that ended and the work, in whole runs."""
    runs, work = [Entrant() for _ in finals], 0.0
    while behind := (now := judge(runs)).behind:
        for index in behind:
            work += now.until - runs[index].reached
            count = [*RUNGS, 1.0].index(now.until) + 1
            runs[index] = entrant(*[finals[index]] * count, ended=now.until == 1)
    return [index for index, run in enumerate(runs) if run.ended], work


@pytest.mark.parametrize(("count", "most"), [(1, 1.0), (3, 0.459), (4, 0.376), (5, 0.4), (10, 0.363), (50, 0.323)])
def test_the_best_wins_and_the_work_is_what_was_told_before(count: int, most: float) -> None:
    scores = [(7 * index) % count / count for index in range(count)]
    ended, work = play(scores)
    assert scores.index(max(scores)) in ended and work / count <= most
    assert work_left([Entrant() for _ in scores]) == pytest.approx(work)


def test_a_race_waits_for_all_and_then_the_better_half_goes_on() -> None:
    assert judge([Entrant(), Entrant()]).behind == (0, 1)
    now = judge([entrant(0.5), entrant(0.7), Entrant(TOTAL), entrant(0.6)])
    assert (now.alive, now.behind, now.until) == ((0, 1, 2, 3), (2,), 1 / 8)
    now = judge([entrant(0.5), entrant(0.7), entrant(0.4), entrant(0.6), entrant(0.1)])
    assert (now.alive, now.behind, now.until) == ((0, 1, 3), (0, 1, 3), 1 / 4)
    assert survivors(5) == 3 and survivors(1) == 1


def test_ties_go_to_the_lower_dev_loss_and_then_to_the_lower_rate() -> None:
    worse_loss = Entrant(TOTAL, ((10, (0.5, -2.0)),))
    assert judge([worse_loss, entrant(0.5)]).alive == (1,)
    assert judge([entrant(0.5), entrant(0.5)]).alive == (0,)
    runs, _ = divide([(Point(1e-3, 5), 0), (Point(1e-4, 9), 0), (Point(1e-3), 0)], {})[0]
    assert [point for point, _ in runs] == [Point(1e-4, 9), Point(1e-3), Point(1e-3, 5)]


def test_a_diverged_run_is_last_and_is_not_waited_for() -> None:
    now = judge([Entrant(TOTAL, (), ended=True), entrant(0.1), entrant(0.2)])
    assert now.alive == (1, 2) and now.until == 1 / 4
    dead = entrant(0.9, ended=True)  # diverged behind the first rung, where it was best
    assert judge([dead, entrant(0.1), entrant(0.2), entrant(0.3)]).alive == (0, 3)
    assert judge([dead, entrant(0.1), entrant(0.2), entrant(0.3, 0.3)]).alive == (3,)
    assert judge([Entrant(TOTAL, (), ended=True)] * 2).behind == ()


def test_runs_that_were_not_raced_are_not_judged_at_rungs_they_have_passed() -> None:
    # Evaluated at its end only: it neither is beaten nor takes the place of another one.
    whole = Entrant(TOTAL, ((TOTAL, (0.4, -1.0)),), ended=True)
    now = judge([whole, entrant(0.5), entrant(0.6), entrant(0.7)])
    assert now.alive == (0, 2, 3) and now.behind == (2, 3)
    # A run beside it goes to its end without rungs.
    assert judge([whole, Entrant()]).until == 1


@pytest.mark.parametrize("total", [1, 2, 3, 5, 345, 375])
def test_short_runs_reach_their_rungs(total: int) -> None:
    runs = [Entrant() for _ in range(4)]
    for _ in range(8):
        now = judge(runs)
        for index in now.behind:
            marks = [mark for mark in runs[index].marks if mark[0] < total]
            step = max(step_at(now.until, total), marks[-1][0] if marks else 0)
            runs[index] = Entrant(total, (*marks, (step, (index / 4, 0.0))), ended=step == total)
    assert judge(runs).behind == () and runs[3].ended


def test_the_first_step_of_a_share_is_exact() -> None:
    assert [step_at(0.1, 30), step_at(1 / 8, 345), step_at(1 / 8, 3), step_at(1.0, 7)] == [3, 44, 1, 7]


def grid(results: Path, **stopped_at: int) -> None:
    """Three rates on seed 100: 1e-3 has succeeded, the others were stopped; and five reported seeds."""
    words = ("task=sst2", "method=lora")
    make_record(results, *words, "lr=1e-3", "seed=100", metrics=0.8)
    for rate in ("1e-4", "1e-2"):
        make_record(
            results, *words, f"lr={rate}", "seed=100", status="stopped", steps={"total": 50, "stopped": 7, **stopped_at}
        )
    for seed in range(5):
        make_record(results, *words, "lr=1e-3", f"seed={seed}", metrics=0.7)


def test_the_choice_of_a_race_is_its_winner_among_all_that_were_tried(tmp_path: Path) -> None:
    grid(tmp_path)
    choice = choose_point(read_runs(tmp_path))
    assert choice is not None and choice.raced and choice.compared == 3
    assert choice.point == Point(1e-3) and choice.edges() == {} and choice.seed == 100
    assert len(choice.reported(read_runs(tmp_path))) == 5


def test_a_race_that_nobody_has_finished_gives_no_choice(tmp_path: Path) -> None:
    make_record(tmp_path, "task=sst2", "lr=1e-3", status="stopped")
    assert choose_point(read_runs(tmp_path)) is None


def test_marks_come_from_the_learning_curve(tmp_path: Path) -> None:
    record = make_record(tmp_path, "task=sst2", "lr=1e-3", status="stopped")
    curve = [{"step": 5, "loss": 1.0}, {"step": 7, "metrics": {"accuracy": 0.6, "loss": 0.5}}]
    text = "\n".join(json.dumps(point) for point in curve)
    (tmp_path / "records" / f"{record.run_id}.jsonl").write_text(f"{text}\n")
    (run,) = read_runs(tmp_path)
    assert read_entrant(RecordStore(tmp_path), run) == Entrant(50, ((7, (0.6, -0.5)),))
    record = make_record(tmp_path, "task=sst2", "lr=1e-2", status="diverged")
    found = [read_entrant(RecordStore(tmp_path), run) for run in read_runs(tmp_path) if run.status == "diverged"]
    assert found == [Entrant(50, (), ended=True)] and found[0].reached == 0 and not math.isnan(work_left(found))


def test_tables_say_that_rates_were_raced_and_print_no_score_of_a_stopped_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from wlora.cli import tables

    grid(tmp_path)
    make_record(tmp_path, "task=sst2", "method=wlora", "k=5", "lr=1e-3", status="stopped")
    tables.main(["1", f"results_dir={tmp_path}", "model=minilm"])
    printed = capsys.readouterr().out
    assert "the best of 3, raced by successive halving, on seed 100 of the same dev set" in printed
    assert "0.7000 ± 0.0000 (5)" in printed and "| WLoRA K=5 |  | – | – |" in printed and "Diverged (" not in printed
    tables.main(["summary", f"results_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "The learning rates of 1 of 1 settings were raced by successive halving." in printed
    assert "tried was chosen" not in printed
