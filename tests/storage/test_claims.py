"""A process that is stopped for longer than its lock's lease and continued: another one takes its run over in between.

The pause is made by hand, before one chosen call that changes a file's or folder's name, is made or removed: the other
process's whole run happens there, in the same process. What follows in the first one is what follows after a pause.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, compose
from tests.training.test_checkpoints import state
from wlora.errors import RunFault, TakenOver
from wlora.experiment import run as experiment
from wlora.storage import locks
from wlora.storage.claims import Claim
from wlora.storage.locks import RunLock
from wlora.storage.records import Record, RecordStore
from wlora.training.checkpoints import CheckpointStore
from wlora.training.interruption import Guard
from wlora.training.state import State

SETTINGS = [
    *("method=wlora", "rank=4", "task.max_train_rows=32", "task.max_eval_rows=16", "train.max_steps=8"),
    *("train.checkpoint_every=3", "train.eval_every=2", "train.save_adapter=true", "method.select_steps=4"),
]
COMPARED = ("metrics", "adapters", "events", "curve", "predictions", "model")
CALLS = ("rename", "replace", "mkdir", "rmdir", "unlink")

Act = Callable[[], Any]


@pytest.fixture(autouse=True)
def _a_lost_lock_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_BETWEEN_LOOKS", 0)


@contextmanager
def paused(when: Callable[[str, str], bool], act: Act) -> Iterator[list[str]]:
    """Let `act` happen before the first call for which `when` is true; yields the calls so far, those of `act` left out."""
    calls: list[str] = []
    done = False

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Any, *rest: Any, **named: Any) -> Any:
            nonlocal done
            if not done:
                text = " ".join(map(os.fspath, [path, *rest[:1]])) if rest and name in CALLS[:2] else os.fspath(path)
                calls.append(f"{name} {text}")
                if when(name, text):
                    done = True
                    act()
            return call(path, *rest, **named)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield calls
    assert done, f"nothing was met among {calls}"


def lose(results: Path) -> None:
    """Let the lease of whoever holds a lock run out."""
    for lock in results.glob("locks/*.lock"):
        lock.unlink()


def files(results: Path) -> dict[str, bytes]:
    """Return all files of a results folder by their names."""
    return {str(path.relative_to(results)): path.read_bytes() for path in results.rglob("*") if path.is_file()}


# Each is a moment of the first process: the call before which it is stopped, and what its path holds.
MOMENTS = {
    "has the lock and no folder yet": ("mkdir", "checkpoints/RUN/"),
    "has its folder and goes to write that it runs": ("replace", "/records/RUN.json"),
    "goes to put the empty curve in its place": ("replace", "/records/RUN.jsonl"),
    "goes to put a checkpoint into its folder": ("rename", "/.step-00000006"),
    "goes to put the checkpoint in its place": ("replace", "/step-00000006"),
    "goes to put the adapters in their place": ("replace", "/adapters/RUN"),
    "goes to remove its checkpoints": ("rmdir", "step-00000006"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_paused_owner_changes_nothing_of_what_has_been_taken_over(
    moment: str, run_tiny: Callable[..., Record], tmp_path: Path
) -> None:
    expected = run_tiny(*SETTINGS, results=tmp_path / "whole")
    results, (call, text) = tmp_path / "shared", MOMENTS[moment]
    others: list[Record] = []
    left: dict[str, bytes] = {}

    def take_over() -> None:
        lose(results)
        others.append(run_tiny(*SETTINGS, results=results))
        left.update(files(results))

    def is_it(name: str, path: str) -> bool:
        return name == call and text.replace("RUN", expected.run_id) in path

    with paused(is_it, take_over):
        if moment == "goes to remove its checkpoints":  # its record was published: there is nothing left to be taken
            assert run_tiny(*SETTINGS, results=results).trained and not others[0].trained
        else:
            with pytest.raises(TakenOver, match="has taken over the run, because this one sent no heartbeat for too long"):
                run_tiny(*SETTINGS, results=results)
            assert others[0].trained
            assert files(results) == left, "what the other process has written"
    (record,) = RecordStore(results)
    assert record.status == "success" and RecordStore(results).read_predictions(record) is not None
    assert len(RecordStore(results).read_curve(record)) == len(RecordStore(tmp_path / "whole").read_curve(expected))
    assert [getattr(record, key) for key in COMPARED] == [getattr(expected, key) for key in COMPARED]
    assert not (results / "checkpoints").exists() and not list((results / "locks").iterdir())
    assert not list(results.glob("*/.*"))


def test_a_taker_goes_on_from_the_checkpoints_of_the_owner_before_it(
    run_tiny: Callable[..., Record], tmp_path: Path
) -> None:
    results = tmp_path / "shared"
    others: list[Record] = []

    def take_over() -> None:
        lose(results)
        others.append(run_tiny(*SETTINGS, results=results))

    with paused(lambda name, path: name == "rename" and "/.step-00000006" in path, take_over), pytest.raises(TakenOver):
        run_tiny(*SETTINGS, results=results)
    assert others[0].resumed_at == [3]


def test_an_owner_that_was_taken_over_says_so_in_a_line_and_exits_with_1(
    tmp_path: Path, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    other = compose(*TINY, *SETTINGS, f"results_dir={tmp_path}")

    def take_over() -> None:
        lose(tmp_path)
        assert experiment.run(other).trained

    with paused(lambda name, path: name == "replace" and "/adapters/" in path, take_over):
        code, _, error = run_main(*TINY, *SETTINGS, f"results_dir={tmp_path}")
    told = "error: another process has taken over the run, because this one sent no heartbeat for too long\n"
    assert (code, error) == (1, told)


def test_a_paused_owner_appends_to_no_curve_but_its_own(tmp_path: Path) -> None:
    first, second = RecordStore(tmp_path).curve("x"), None
    first({"step": 1})
    second = RecordStore(tmp_path).curve("x")
    second({"step": 1})
    before = (tmp_path / "records" / "x.jsonl").read_bytes()
    shut: list[Path] = []
    first._put = lambda staging, target: shut.append(target)  # a run that is another's puts nothing anywhere
    first({"step": 2})
    assert (tmp_path / "records" / "x.jsonl").read_bytes() == before and len(shut) == 1
    second({"step": 2})
    assert len(RecordStore(tmp_path).read_curve(Record(run_id="x", status="running", config={}))) == 2


@pytest.mark.parametrize(("call", "text"), [("mkdir", "checkpoints/run/"), ("rename", "dead/step-00000003")])
def test_a_process_that_is_paused_as_it_shuts_out_others_harms_no_later_one(call: str, text: str, tmp_path: Path) -> None:
    dead = tmp_path / "checkpoints" / "run" / "dead"
    for step in (3, 6):
        written = CheckpointStore(tmp_path, "run", keep=9).write(state(step))
        dead.mkdir(exist_ok=True)
        written.rename(dead / written.name)
    first, later = RunLock(tmp_path, "run"), RunLock(tmp_path, "run")
    assert first.acquire()
    with ExitStack() as until_the_end:
        claims: list[Claim] = []

        def take_over() -> None:
            lose(tmp_path)
            assert later.acquire()
            claims.append(Claim(tmp_path, later, later.token or ""))
            until_the_end.enter_context(claims[0].opened())

        opened = Claim(tmp_path, first, first.token or "").opened()
        with paused(lambda name, path: name == call and text in path, take_over), pytest.raises(TakenOver), opened:
            pass
        first.release()
        found = CheckpointStore(tmp_path, "run", keep=9, claim=claims[0])
        assert [s.facts["step"] for _, s in found.read() if isinstance(s, State)] == [6, 3]
        found.write(state(9))
    assert sorted(path.name for path in dead.parent.iterdir()) == [f"step-0000000{step}" for step in (3, 6, 9)]
    later.release()


def test_an_owners_checkpoints_stand_beside_its_folder_before_and_after(tmp_path: Path) -> None:
    base = tmp_path / "checkpoints" / "run"
    CheckpointStore(tmp_path, "run", keep=2).write(state(3))  # as versions without claims left it
    (base / ".step-00000006.99").mkdir()
    for afresh in (False, True):
        lock = RunLock(tmp_path, "run")
        assert lock.acquire()
        with lock.held(), Claim(tmp_path, lock, lock.token or "").opened(afresh=afresh):
            assert [path.name for path in base.iterdir()] == [lock.token]
            assert CheckpointStore(tmp_path, "run", keep=2).present() is not afresh
        assert [path.name for path in base.glob("*")] == ([] if afresh else ["step-00000003"])
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("made", ["checkpoints/run", "checkpoints/run/TOKEN"])
def test_folders_that_an_ending_process_removes_as_empty_are_made_again(made: str, tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "run")
    assert lock.acquire() and lock.token
    path = str(tmp_path / made.replace("TOKEN", lock.token))
    (tmp_path / "checkpoints").mkdir()
    pause = paused(lambda name, at: (name, at) == ("mkdir", path), lambda: shutil.rmtree(tmp_path / "checkpoints"))
    with pause, lock.held(), Claim(tmp_path, lock, lock.token).opened():
        assert (tmp_path / "checkpoints" / "run" / lock.token).is_dir()


def test_a_folder_that_cannot_be_taken_over_ends_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CheckpointStore(tmp_path, "run", keep=2).write(state(3)).rename(tmp_path / "step-00000003")
    dead = tmp_path / "checkpoints" / "run" / "dead"
    dead.mkdir()
    (tmp_path / "step-00000003").rename(dead / "step-00000003")
    lock = RunLock(tmp_path, "run")
    assert lock.acquire()

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "rename", fail)
    told = "the checkpoints there cannot be taken over .Input/output error.; none was removed"
    with pytest.raises(RunFault, match=told), lock.held(), Claim(tmp_path, lock, lock.token or "").opened():
        pass
    assert len(list((dead / "step-00000003").iterdir())) == 3


def test_a_run_whose_folder_was_removed_by_hand_stops_and_says_so(run_tiny: Callable[..., Record], tmp_path: Path) -> None:
    before = Guard.save

    def save(self: Guard, *given: Any) -> None:
        shutil.rmtree(tmp_path / "checkpoints")
        before(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "save", save)
        with pytest.raises(TakenOver, match="was removed while the run needed it\nway out: run the same command again"):
            run_tiny(*SETTINGS)
    assert run_tiny(*SETTINGS).status == "success"
