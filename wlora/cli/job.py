"""One run as a job of a sweep: the function that a launcher calls, possibly in another process, and the outcome it returns.

torch is imported only after the configuration of the run has been checked.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wlora.cli.help import show_values
from wlora.config.presets import apply_presets
from wlora.config.schema import Config
from wlora.config.spelling import check_read, explain, unknown_key
from wlora.console import protect_output, put, tell
from wlora.data.held_out import count_folds
from wlora.distributed import all_failed, is_main, lost_another, several
from wlora.errors import ConfigError, RunFault, as_fault, wrong_value

if TYPE_CHECKING:
    from wlora.storage.records import Record

# The schema of a launcher plugin has the same name as our file in conf/hydra/launcher, so that it checks our file; Hydra
# warns about this. The filter is set in this module because launcher processes import it before composing.
warnings.filterwarnings("ignore", r"(?s).*is validated against ConfigStore schema", UserWarning)


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended.

    Attributes:
        name: the swept keys with the values of this run.
        told: the error message for the sweep's summary, because some launchers hide the output of their processes.
        seconds: duration of the run; None if it was skipped or failed.
    """

    name: str
    status: str
    score: float | None
    exit_code: int
    told: str = ""
    seconds: float | None = None


@dataclass
class Outcomes:
    """The outcomes of all runs of the current command.

    Attributes:
        outcomes: one per run, in order.
        command: whether this process was started from the command line, not by a launcher.
    """

    outcomes: list[Outcome]
    command: bool = False


OUTCOMES = Outcomes([])


@dataclass
class Sweep:
    """Information about the sweep for the headings of its runs. It is pickled with the task function for launcher processes.

    Attributes:
        keys: the swept keys.
        in_batches: whether the sweeper launches the runs in several batches; the total is then unknown.
        total: number of runs; None if unknown.
    """

    keys: frozenset[str]
    in_batches: bool = False
    total: int | None = None

    def label(self, words: Sequence[str]) -> str:
        """Return the arguments that distinguish a run from the others of the sweep."""
        return " ".join(word.lstrip("+") for word in words if word.partition("=")[0].lstrip("+") in self.keys)

    def heading(self, number: int, label: str) -> str:
        """Return the heading of a run. It shows the time left only if the runs execute one after another in this process."""
        count = f"run {number}" + (f" of {self.total}" if self.total else "")
        lengths = [outcome.seconds for outcome in OUTCOMES.outcomes if outcome.seconds is not None]
        left = ""
        if OUTCOMES.command and lengths and self.total:
            from wlora.cli.sweep import duration

            left = f" (about {duration(sum(lengths) / len(lengths) * (self.total - number + 1))} left)"
        return f"{count}: {label}".removesuffix(": ") + left


def run_one(composed: DictConfig, sweep: Sweep | None = None) -> Outcome:
    """Run one composed configuration: the function that Hydra calls, in this process or in a launcher's.

    Raises:
        KeyboardInterrupt: a signal asked the command to stop.
        SystemExit: a signal stopped a submitit job, which may have been requeued.
    """
    from hydra.core.hydra_config import HydraConfig

    protect_output()
    overrides = job_words()
    name = ""
    if sweep is not None:
        name = sweep.label(overrides)
        if is_main():
            put(sweep.heading(HydraConfig.get().job.num + 1, name))
    try:
        in_sweep = sweep is not None
        outcome = attempt(name, lambda: _run_composed(name, composed, overrides, in_sweep=in_sweep), in_sweep=in_sweep)
    except KeyboardInterrupt as stop:
        if OUTCOMES.command:
            raise
        outcome = Outcome(name, "interrupted", None, getattr(stop, "exit_code", 130), str(stop))
        if "SUBMITIT_EXECUTOR" in os.environ:
            _forward_signal(outcome.exit_code)
    OUTCOMES.outcomes.append(outcome)
    return outcome


def job_words() -> list[str]:
    """Return the command-line arguments of the run that Hydra has just composed."""
    from hydra.core.hydra_config import HydraConfig

    # Unresolved: arguments may contain interpolations, which cannot be resolved within Hydra's own configuration.
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return [str(word) for word in words]


def _forward_signal(exit_code: int) -> None:
    """Forward the signal to submitit's handler, which requeues the job and exits. The run had replaced this handler.

    If the handler returns, this process exits with the signal's exit code, so that submitit stores no successful result.
    """
    handler = signal.getsignal(exit_code - 128)
    if callable(handler):
        handler(exit_code - 128, None)
    sys.exit(exit_code)


def attempt(name: str, act: Callable[[], Outcome], *, in_sweep: bool = False) -> Outcome:
    """Call `act`. A failure is printed in one or two lines and does not stop a sweep.

    In a multi-process run, a failure that may affect only this process exits, so that the launcher stops the others.
    """
    try:
        return act()
    except (ConfigError, OmegaConfBaseException) as error:
        mistake = error if isinstance(error, ConfigError) else ConfigError(explain(error))
        fail(mistake)
        if in_sweep and several() and not all_failed():
            sys.exit(ConfigError.exit_code)
        return Outcome(name, "ConfigError", None, ConfigError.exit_code, str(mistake))
    except RunFault as error:
        return _end_run(name, error)
    except Exception as error:
        if lost_another(error):
            fail(RunFault("another process of this run has ended, so this one stops"))
            sys.exit(RunFault.exit_code)
        if fault := as_fault(error):
            return _end_run(name, fault)
        # A bug in the program: the record has status `failed`, and the traceback is printed for the developers.
        import traceback

        traceback.print_exc()
        if several():
            sys.exit(RunFault.exit_code)
        return Outcome(name, "failed", None, RunFault.exit_code, f"{type(error).__name__}: {error}")


def _end_run(name: str, fault: RunFault) -> Outcome:
    """Print why a run failed. A sweep continues, except in a multi-process run if not all processes fail in the same way."""
    fail(fault)
    if several() and not fault.everywhere:
        sys.exit(fault.exit_code)
    return Outcome(name, type(fault).__name__, None, fault.exit_code, str(fault))


def _run_composed(name: str, composed: DictConfig, overrides: list[str], *, in_sweep: bool) -> Outcome:
    """Run one composed configuration.

    Args:
        name: label of the run in its sweep.
        composed: the configuration composed by Hydra.
        overrides: the command-line arguments, or those of this run of a sweep. Presets do not change their keys.
        in_sweep: whether the run belongs to a sweep, whose runs share loaded models and data.
    """
    config = settle(composed, overrides, in_sweep=in_sweep)
    if (folds := count_folds(config.task)) and config.task.fold is None and not config.dry_run:
        return _run_folds(name, config, overrides, folds)
    if config.dry_run:
        return describe_run(name, config)
    from wlora.experiment.run import run
    from wlora.experiment.shared_inputs import inputs_of_process

    return outcome_of(name, run(config, overrides, inputs_of_process() if in_sweep else None))


def describe_run(name: str, config: Config) -> Outcome:
    """Print what a run would do (`dry_run=true`)."""
    from wlora.experiment.dry_run import describe

    text = describe(config)  # in every process, because one that fails must fail in all
    if is_main():
        put(text)
    return Outcome(name, "described", None, 0)


def _run_folds(name: str, config: Config, overrides: list[str], folds: int) -> Outcome:
    """Train once per fold, and print and return the mean score. Each fold has a record."""
    from wlora.experiment.run import run
    from wlora.experiment.shared_inputs import inputs_of_process

    found = []
    for fold in range(folds):
        if is_main():
            put(f"fold {fold + 1} of {folds}")
        own = copy.deepcopy(config)
        own.task.fold = fold
        found.append(outcome_of(name, run(own, overrides, inputs_of_process())))
    scores = [outcome.score for outcome in found if outcome.score is not None]
    mean = statistics.fmean(scores) if scores else None
    if mean is not None and len(scores) == folds and is_main():
        spread = statistics.stdev(scores)
        put(f"folds      {config.task.primary_metric} {mean:.4f}, standard deviation {spread:.4f}, over {folds} folds")
    seconds = [outcome.seconds for outcome in found if outcome.seconds is not None]
    worst = next((outcome for outcome in found if outcome.status != "success"), found[-1])
    return dataclasses.replace(worst, score=mean, seconds=sum(seconds) if seconds else None)


def outcome_of(name: str, record: Record) -> Outcome:
    """Return the outcome of a run with a record."""
    seconds = record.seconds["total"] if record.trained else None
    told = record.error or "" if record.status == "stopped" else ""
    return Outcome(name, record.status, record.metrics.get(record.primary_metric), 0, told, seconds)


def settle(composed: DictConfig, overrides: Sequence[str], *, in_sweep: bool) -> Config:
    """Return the checked configuration of a run, with presets and tuned values filled in.

    Args:
        composed: the configuration composed by Hydra.
        overrides: its command-line arguments.
        in_sweep: whether the run belongs to a sweep.

    Raises:
        ConfigError: a value is not allowed, or an input is missing.
    """
    from wlora.analysis.tuning import fill_tuned, wanted_keys
    from wlora.data.sources import fingerprint
    from wlora.experiment.requirements import require_all
    from wlora.experiment.resolve import resolve
    from wlora.models.source import locate

    _refuse_removed_keys(composed)
    _refuse_foreign_task(composed)
    preset = apply_presets(composed, overrides)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    _refuse_added_keys(composed)
    if not in_sweep:
        check_read([overrides], lambda _: composed)
        if config.race != "off":
            raise wrong_value("race", config.race, "off for a single run: a sweep (-m) is raced")
    if preset:
        tell(f"preset: {show_values(preset)}")
    resolve(config)
    require_all(config)
    source, data = locate(config.model), fingerprint(config.task)
    wanted = wanted_keys(config)
    choice = fill_tuned(config, task_data=data, model_data=source.fingerprint)
    if choice is not None:
        where = config.tune_on or config.task.name
        tell(f"tuned: {choice.describe(wanted)}, best of {choice.compared} on {where} seed={choice.seed}")
        if "lr" in wanted and config.lr != choice.point.lr:
            tell(f"beyond: lr={config.lr}")
    return config


def _refuse_foreign_task(composed: DictConfig) -> None:
    """Reject a task that is missing from the experiment's task-specific values (`per_task`)."""
    name = composed.task.name
    if composed.per_task and name not in composed.per_task:
        raise wrong_value("task", name, f"{', '.join(composed.per_task)} in this experiment")


def _refuse_removed_keys(composed: DictConfig) -> None:
    """Reject the removal of keys with Hydra's `~key`: every run needs all keys and the name of a method."""
    for key in (field.name for field in dataclasses.fields(Config)):
        if key not in composed:
            raise ConfigError(f"~{key}: allowed is {key}=VALUE: every run has this key")
    if "name" not in composed.method:
        raise ConfigError("~method or ~method.name: allowed is method=NAME: every run has a method")


def _refuse_added_keys(composed: DictConfig) -> None:
    """Reject keys that Hydra's `+key=value` has added outside the schema, because no code reads them."""
    schema = OmegaConf.structured(Config)
    for parent in ("", "task", "task.generation", "model", "train", "adapter"):
        allowed = list(_node(schema, parent).keys())  # keys(): a missing value is still a key
        for name in _node(composed, parent):
            if name not in allowed:
                raise unknown_key(f"{parent}.{name!s}".lstrip("."))


def _node(config: DictConfig, parent: str) -> DictConfig:
    node: DictConfig = OmegaConf.select(config, parent) if parent else config
    return node


def fail(error: Exception) -> None:
    """Print an error to stderr."""
    put(f"error: {error}", sys.stderr)
