"""`hydra/launcher=packed`: compatible runs of a sweep train together, in one forward and backward pass.

Hydra's launcher composes and checks all runs first. Then runs with equal model, data, precision and batch shape form packs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from wlora.cli.job import OUTCOMES, Outcome, Sweep, attempt, describe_run, job_words, outcome_of, settle
from wlora.console import protect_output, say
from wlora.data.held_out import count_folds
from wlora.distributed import several
from wlora.errors import ConfigError

if TYPE_CHECKING:
    from wlora.experiment.packed import Entry
    from wlora.storage.records import Record


@dataclass(frozen=True)
class Prepared:
    """A checked run before training: its label in the sweep and its configuration."""

    name: str
    entry: Entry


def prepare_one(composed: DictConfig, sweep: Sweep) -> Prepared | Outcome:
    """Check one composed configuration: the function that Hydra's launcher calls for each run."""
    protect_output()
    overrides = job_words()
    name, found = sweep.label(overrides), list[Prepared]()

    def act() -> Outcome:
        from wlora.experiment.packed import Entry

        config = settle(composed, overrides, in_sweep=True)
        if (folds := count_folds(config.task)) and config.task.fold is None:
            numbers = ",".join(map(str, range(folds)))
            raise ConfigError(
                f"task.validation=folds={folds} hydra/launcher=packed: add the folds, as in task.fold={numbers}"
            )
        if config.dry_run:
            return describe_run(name, config)
        found.append(Prepared(name, Entry(config, overrides)))
        return Outcome(name, "prepared", None, 0)

    outcome = attempt(name, act, in_sweep=True)
    return found[0] if found else outcome


class Packing:
    """A wrapper of Hydra's launcher that trains the checked runs in packs.

    Args:
        launcher: Hydra's launcher; its task function is `prepare_one`.
    """

    def __init__(self, launcher: Any) -> None:
        self._launcher = launcher

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Check all runs, train them, and return Hydra's jobs with their outcomes.

        Raises:
            ConfigError: the command was started with several processes.
            KeyboardInterrupt: a signal asked to stop.
        """
        if several():
            raise ConfigError("hydra/launcher=packed: allowed is one process; leave out the launcher for several")
        returned = list(self._launcher.launch(job_overrides, initial_job_idx=initial_job_idx))
        waiting = [job for job in returned if isinstance(getattr(job, "_return_value", None), Prepared)]
        prepared = [job._return_value for job in waiting]
        for index, outcome in _train(prepared):
            waiting[index]._return_value = outcome
        return returned


def _train(prepared: Sequence[Prepared]) -> Iterator[tuple[int, Outcome]]:
    """Train all runs. When a run ends, yield its index and outcome."""
    from wlora.experiment.packed import group, run_pack, why_alone

    entries = [run.entry for run in prepared]
    for chosen in group(entries):
        first = prepared[chosen[0]]
        if reason := why_alone(first.entry.config):
            say(f"run {chosen[0] + 1} of {len(prepared)}: {first.name} (alone: {reason})")
            yield chosen[0], _note(attempt(first.name, partial(_run_alone, first), in_sweep=True))
            continue
        size = None if first.entry.config.pack == "auto" else int(first.entry.config.pack)
        say(f"packed     {len(chosen)} runs, {'as many at once as fit into memory' if size is None else f'{size} at once'}")
        for index, found in run_pack(entries, chosen, size):
            name = prepared[index].name
            yield index, _note(attempt(name, partial(_tell, name, found), in_sweep=True))


def _note(outcome: Outcome) -> Outcome:
    OUTCOMES.outcomes.append(outcome)
    return outcome


def _run_alone(prepared: Prepared) -> Outcome:
    from wlora.experiment.run import run
    from wlora.experiment.shared_inputs import inputs_of_process

    return outcome_of(prepared.name, run(*prepared.entry, inputs_of_process()))


def _tell(name: str, found: Record | BaseException) -> Outcome:
    if isinstance(found, BaseException):
        raise found
    return outcome_of(name, found)
