"""Periodic checkpoints, graceful shutdown on signals, and resume."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from wlora.console import say
from wlora.distributed import from_main, several
from wlora.errors import RunFault, TakenOver
from wlora.storage.curve_writer import CurveWriter
from wlora.storage.environment import compare_environments, join_environments
from wlora.storage.locks import RunLock
from wlora.storage.records import Record
from wlora.training.checkpoints import CheckpointStore
from wlora.training.state import State
from wlora.training.trainer import Trainer

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))

# A launcher may forward a signal that the terminal or the scheduler has already sent to its processes.
ECHO_SECONDS = 2.0

# Used instead of a signal number: another process has taken the lock.
LOST = 1000
# Number of environment differences in the message; the record has all.
_SHOWN = 4


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal. Its state is saved; at the end of the run, its record is.

    Attributes:
        exit_code: 128 + the signal's number, as in a shell.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name} after step {step}; repeat the same command to resume from there")
        self.exit_code = 128 + number


class Stopped(Exception):
    """The run has reached the step `train.until`. Its state is saved.

    Attributes:
        step: the last step taken.
    """

    def __init__(self, step: int, total: int) -> None:
        super().__init__(f"after step {step} of {total} (train.until)")
        self.step = step


class StopSignals:
    """The signals that ask a process to stop; the runs of a pack share one object.

    Attributes:
        asked: number of the first signal received; None if there was none.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._heard = 0.0
        self._listening = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle stop signals in this block: the first one stops after the current step, a second one stops immediately.

        A block within another one changes nothing.
        """
        if self._listening:
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is not None:
            if several() and now - self._heard < ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        self.asked, self._heard = number, now
        say(f"{signal.Signals(number).name}: stopping after this step; a second signal stops immediately")


class Guard:
    """Called after every optimiser step: saves the state when a checkpoint is due or a signal has asked to stop.

    Args:
        store: the run's checkpoints.
        lock: the run's lock, which another process may take over.
        curve: the run's learning curve.
        record: the run's record.
        signals: the signals that ask the process to stop.
        begin: `time.perf_counter()` when this process began the run.
    """

    def __init__(
        self,
        store: CheckpointStore,
        lock: RunLock,
        *,
        curve: CurveWriter,
        record: Record,
        signals: StopSignals,
        begin: float,
    ) -> None:
        self.store, self.lock, self.curve, self.record = store, lock, curve, record
        self._signals, self._begin = signals, begin

    def seconds(self) -> float:
        """Return the seconds since the run began, including those of interrupted processes."""
        return time.perf_counter() - self._begin

    def __call__(self, trainer: Trainer) -> None:
        """Save and stop if necessary after the step that has just ended.

        Raises:
            Interrupted: any process received a signal to stop.
            Stopped: the run has reached the step `train.until`.
            TakenOver: another process has taken over the run.
        """
        asked = self._asked_anywhere(trainer.accelerator)
        if asked == LOST:
            raise TakenOver(f"{self.lock.holder()} has taken over the run, because this one sent no heartbeat for too long")
        last = trainer.step == trainer.plan.total_steps
        every = trainer.plan.checkpoint_every
        due = every > 0 and trainer.passed(every)
        stops = trainer.plan.stops(trainer.step)
        if (due or asked or stops) and not last:
            self.save(trainer)
        if asked and not last:
            raise Interrupted(asked, trainer.step)
        if stops:
            raise Stopped(trainer.step, trainer.plan.total_steps)

    def answer(self, trainer: Trainer) -> None:
        """Exit if a signal arrived after the last step. The run's record is complete at this point.

        Raises:
            Interrupted: any process received a signal to stop.
        """
        asked = self._asked_anywhere(trainer.accelerator)
        if asked not in (0, LOST):
            raise Interrupted(asked, trainer.step)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint. All processes take part; the main process writes."""
        state = trainer.capture()
        state.facts |= {
            "curve": self.curve.points,
            "seconds": self.seconds(),
            "resumed_at": self.record.resumed_at,
            "git_commit": self.record.environment.get("git_commit"),
            "environments": self._environments(trainer.step),
        }
        if trainer.accelerator.is_main_process:
            self.store.write(state)
        trainer.accelerator.wait_for_everyone()

    def resume(self, trainer: Trainer) -> None:
        """Resume from the newest intact checkpoint, if there is one.

        Raises:
            RunFault: an intact checkpoint does not fit this code.
        """
        found = self._newest(trainer.accelerator)
        if found is None:
            return
        folder, state = found
        try:
            trainer.restore(state)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise RunFault(
                f"checkpoint {self.store.place(folder)} was written by other code "
                f"(commit {state.facts['git_commit']}): {error}\n"
                "way out: force=true starts again from step 0"
            ) from error
        self._note_environment(state, trainer.step)
        self.record.resumed_at = [*state.facts["resumed_at"], trainer.step]
        self.curve.restart(state.facts["curve"])
        say(f"resumed    after step {trainer.step} of {trainer.plan.total_steps}")
        self._begin -= state.facts["seconds"]

    def _environments(self, step: int) -> list[dict[str, Any]]:
        """Return the environments in which the run has reached a step; the one of this process is last."""
        own = {key: value for key, value in self.record.environment.items() if key != "earlier"}
        return [*self.record.environment.get("earlier", []), {"until": step, **own}]

    def _note_environment(self, state: State, step: int) -> None:
        """Add the environments of earlier processes to the record, and report differences from the last of them."""
        older = {"until": step, "git_commit": state.facts["git_commit"]}
        past, now = state.facts.get("environments", [older]), self.record.environment
        if earlier := join_environments(past, now):
            now["earlier"] = earlier
        changes = compare_environments(past[-1], now)
        if commit := changes.pop("git_commit", None):
            say(f"notice: the checkpoint was written by commit {commit[0]}")
        if changes:
            told = [f"{key} {before} -> {after}" for key, (before, after) in changes.items()]
            more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
            say(
                f"notice: the steps up to {step} were computed in another environment ({', '.join(told[:_SHOWN])}{more}): "
                "numbers may differ from those of an uninterrupted run"
            )

    def _newest(self, accelerator: Accelerator) -> tuple[Path, State] | None:
        """Return the newest intact checkpoint.

        The main process chooses, so that all processes resume from the same one.

        Damaged checkpoints are removed. Otherwise they would count towards the number that is kept and displace intact
        ones.
        """
        found: tuple[Path, State] | None = None
        broken: list[Path] = []
        for folder, state in self.store.read() if accelerator.is_main_process else ():
            if isinstance(state, State):
                found = folder, state
                break
            say(f"notice: checkpoint {self.store.place(folder)} is damaged and skipped ({state})")
            broken.append(folder)
        if broken and found is None:
            say("notice: no checkpoint of this run is intact: it starts again from step 0")
        for folder in broken:
            self.store.discard(folder)
        chosen = from_main(found[0].name if found else None)
        if chosen is None or found is not None:
            return found
        read = dict(self.store.read()).get(self.store.folder / chosen, "it does not exist")
        if isinstance(read, str):
            raise RunFault(
                f"checkpoint {self.store.place(Path(chosen))} is intact on the main process but not on this one ({read})"
            )
        return self.store.folder / chosen, read

    def _asked_anywhere(self, accelerator: Accelerator) -> int:
        """Return the number of a signal that any process has received, 0 for none, or LOST."""
        asked = LOST if self.lock.lost else self._signals.asked or 0
        if accelerator.num_processes == 1:
            return asked
        heard = accelerator.gather(torch.tensor([asked], device=accelerator.device))
        return int(heard.max())
