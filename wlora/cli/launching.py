"""Wrappers of Hydra's launchers, which start the runs of a sweep. They collect the outcomes of all runs for the command."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from wlora.analysis.study import Run
from wlora.cli.job import OUTCOMES, Outcome, Sweep
from wlora.cli.packed import Packing, prepare_one
from wlora.cli.racing import is_raced, race
from wlora.config.presets import apply_presets
from wlora.config.spelling import check_read, swept_keys
from wlora.console import tell
from wlora.errors import ConfigError, RunFault

# Launchers with a file in conf/hydra/launcher, and the extra of wlora that installs each.
EXTRAS = {"joblib": "joblib", "submitit": "slurm", "ray": "ray"}


class Collecting:
    """A wrapper of a Hydra launcher that collects the outcomes of its jobs and returns their scores to the sweeper.

    Args:
        launcher: the Hydra launcher.
        name: its name in the configuration, for messages.
        sweep: information for the headings of the runs.
        compose: returns the configuration of a run, given its arguments.
    """

    def __init__(self, launcher: Any, name: str, sweep: Sweep, compose: Callable[[Sequence[str]], DictConfig]) -> None:
        self._launcher, self._name, self._sweep, self._compose = launcher, name, sweep, compose

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Launch jobs and wait for them.

        Raises:
            ConfigError: a key that no job reads.
            RunFault: a process of the launcher has ended without a result.
        """
        for notice in check_read(job_overrides, self._compose):
            tell(f"notice: {notice}")
        before = len(OUTCOMES.outcomes)
        first = self._compose(job_overrides[0])
        if is_raced(first, swept=self._sweep.keys, in_batches=self._sweep.in_batches):
            returned = self._race(job_overrides, initial_job_idx)
        else:
            returned = self._run(job_overrides, initial_job_idx)
        found = [job for job in returned if isinstance(getattr(job, "_return_value", None), Outcome)]
        OUTCOMES.outcomes[before:] = [job._return_value for job in found]
        for job in found:
            job.return_value = job._return_value.score
        return list(returned)

    def _race(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        from hydra.core.utils import JobReturn, JobStatus

        before = len(OUTCOMES.outcomes)

        def advance(jobs: list[list[str]]) -> Sequence[Any]:
            del OUTCOMES.outcomes[before:]  # remove the outcomes of the previous round: each run has only one
            return self._run(jobs, initial_job_idx)

        returned = race(job_overrides, self._compose, advance)
        for index, run in enumerate(returned):
            if isinstance(run, Run):  # decided by an earlier command
                name, score = self._sweep.label(job_overrides[index]), run.score if run.status == "success" else None
                outcome = Outcome(name, run.status, score, 0, run.record.error or "")
                returned[index] = JobReturn(_return_value=outcome, status=JobStatus.COMPLETED)
        return returned

    def _run(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        if not self._sweep.in_batches:
            self._sweep.total = len(job_overrides)
        try:
            return list(self._launcher.launch(job_overrides, initial_job_idx=initial_job_idx))
        except (ConfigError, OSError, ValueError, TypeError, AttributeError, KeyError, OmegaConfBaseException):
            raise
        except Exception as error:  # each launcher raises its own exception classes
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise RunFault(
                f"hydra/launcher={self._name}: {type(error).__name__}: {reason}\n"
                "way out: repeat the command; it skips finished runs and continues with the others"
            ) from error


@contextmanager
def collecting() -> Iterator[None]:
    """Context manager: wrap every launcher that Hydra creates in `Collecting`, to collect the outcomes of all jobs.

    Raises:
        ConfigError: raised within the block if the launcher is not installed.
    """
    from hydra.core.plugins import Plugins

    before = Plugins.instantiate_launcher

    def instantiate(self: Plugins, hydra_context: Any, task_function: Any, config: DictConfig) -> Collecting:
        name = _require_launcher(config)
        whole = config.hydra.sweeper._target_.endswith(".BasicSweeper") and config.hydra.sweeper.max_batch_size is None
        sweep = Sweep(swept_keys(config), in_batches=not whole)
        if name == "packed":
            launcher: Any = Packing(before(self, hydra_context, functools.partial(prepare_one, sweep=sweep), config))
        else:
            launcher = before(self, hydra_context, functools.partial(task_function, sweep=sweep), config)

        def compose(words: Sequence[str]) -> DictConfig:
            composed: DictConfig = hydra_context.config_loader.load_sweep_config(config, list(words))
            with suppress(ConfigError):  # the run itself will raise it again
                apply_presets(composed, words)
            return composed

        return Collecting(launcher, name, sweep, compose)

    Plugins.instantiate_launcher = instantiate
    try:
        yield
    finally:
        Plugins.instantiate_launcher = before


def _require_launcher(config: DictConfig) -> str:
    """Return the name of the chosen launcher; ConfigError if its plugin is not installed."""
    name = str(config.hydra.runtime.choices["hydra/launcher"])
    package = str(config.hydra.launcher._target_).split(".")[:2]
    extra = EXTRAS.get(name.partition("_")[0])
    try:
        there = importlib.util.find_spec(".".join(package)) is not None
    except ModuleNotFoundError:
        there = False
    if extra and not there:
        raise ConfigError(f"hydra/launcher={name}: its plugin is not installed: pip install 'wlora[{extra}]'")
    return name
