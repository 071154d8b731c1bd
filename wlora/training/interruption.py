"""What stands between a run and its loss: checkpoints as it goes, signals that stop it in order, the way back in."""

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

# A launcher passes a signal on that the terminal or the scheduler has sent to its processes, too.
ECHO_SECONDS = 2.0

# In place of a signal's number: the lock is another's.
LOST = 1000
# Differences of an environment that are told; the record has all.
_SHOWN = 4


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is saved, or at its end its record is.

    Attributes:
        exit_code: 128 + the signal's number, as a shell reports it.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name} after step {step}; the same command goes on from there")
        self.exit_code = 128 + number


class Guard:
    """Called after every optimiser step: saves the state when it is due, or at once when a signal asks to stop.

    Args:
        lock: the right to run, which may be lost to another process.
        every: optimiser steps between checkpoints; 0 for none but those that signals ask for.
        begin: `time.perf_counter()` when this process began the run.
    """

    def __init__(
        self,
        store: CheckpointStore,
        lock: RunLock,
        *,
        curve: CurveWriter,
        record: Record,
        every: int,
        begin: float,
    ) -> None:
        self.store, self.lock, self.curve, self.record = store, lock, curve, record
        self.every, self._begin = every, begin
        self._asked: int | None = None
        self._heard = 0.0

    def seconds(self) -> float:
        """Return the seconds since the run began, those of interrupted processes included."""
        return time.perf_counter() - self._begin

    def __call__(self, trainer: Trainer) -> None:
        """Look after the step that has just ended.

        Raises:
            Interrupted: a signal asked to stop, on any process.
            TakenOver: another process has taken over the run.
        """
        asked = self._asked_anywhere(trainer.accelerator)
        if asked == LOST:
            raise TakenOver(f"{self.lock.holder()} has taken over the run, since this one gave no sign of life")
        last = trainer.step == trainer.plan.total_steps
        due = self.every > 0 and trainer.passed(self.every)
        if (due or asked) and not last:
            self.save(trainer)
        if asked and not last:
            raise Interrupted(asked, trainer.step)

    def answer(self, trainer: Trainer) -> None:
        """End the command if a signal came too late to stop the run, whose record is whole by now.

        Raises:
            Interrupted: a signal asked to stop, on any process.
        """
        asked = self._asked_anywhere(trainer.accelerator)
        if asked not in (0, LOST):
            raise Interrupted(asked, trainer.step)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint; every process takes part, the main one writes."""
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
        """Go on from the newest checkpoint that holds, if there is one.

        Raises:
            RunFault: a whole checkpoint that does not fit this code.
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
                "way out: force=true starts afresh"
            ) from error
        self._note_environment(state, trainer.step)
        self.record.resumed_at = [*state.facts["resumed_at"], trainer.step]
        self.curve.restart(state.facts["curve"])
        say(f"resumed    after step {trainer.step} of {trainer.plan.total_steps}")
        self._begin -= state.facts["seconds"]

    def _environments(self, step: int) -> list[dict[str, Any]]:
        """Return the environments in which the run has got as far as a step, this process's last."""
        own = {key: value for key, value in self.record.environment.items() if key != "earlier"}
        return [*self.record.environment.get("earlier", []), {"until": step, **own}]

    def _note_environment(self, state: State, step: int) -> None:
        """Let the record name the environments of the processes before, and say what differs here from the last one's."""
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
        """Return the newest checkpoint that holds; the main process looks, so that all go on from the same.

        It removes the broken ones: they would push whole ones out of the newest that are kept.
        """
        found: tuple[Path, State] | None = None
        broken: list[Path] = []
        for folder, state in self.store.read() if accelerator.is_main_process else ():
            if isinstance(state, State):
                found = folder, state
                break
            say(f"notice: checkpoint {self.store.place(folder)} is broken and skipped ({state})")
            broken.append(folder)
        if broken and found is None:
            say("notice: no checkpoint of this run is whole: it starts afresh")
        for folder in broken:
            self.store.discard(folder)
        chosen = from_main(found[0].name if found else None)
        if chosen is None or found is not None:
            return found
        read = dict(self.store.read()).get(self.store.folder / chosen, "it is not there")
        if isinstance(read, str):
            raise RunFault(f"checkpoint {self.store.place(Path(chosen))} holds on the main process and not here ({read})")
        return self.store.folder / chosen, read

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let the signals that ask to stop be heard at the end of a step or of the run; a second one stops at once."""
        before = {number: signal.signal(number, self._hear) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is not None:
            if several() and now - self._heard < ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        self._asked, self._heard = number, now
        say(f"{signal.Signals(number).name}: stopping after this step; again stops at once")

    def _asked_anywhere(self, accelerator: Accelerator) -> int:
        """Return the number of a signal that any process has heard, 0 for none, or LOST."""
        asked = LOST if self.lock.lost else self._asked or 0
        if accelerator.num_processes == 1:
            return asked
        heard = accelerator.gather(torch.tensor([asked], device=accelerator.device))
        return int(heard.max())
