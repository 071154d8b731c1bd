"""The values `tuned` and `beyond`: learning rates and warm-up chosen among the recorded runs of a setting.

Never imports torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from wlora.analysis.study import ENDED, TRIED, Point, Run, name_rows, require_one_setting, show, without_point
from wlora.analysis.study_reader import read_study
from wlora.config.identity import scientific_fields
from wlora.config.schema import Config
from wlora.console import tell
from wlora.distributed import from_main, several
from wlora.errors import ConfigError
from wlora.storage.locks import RunLock
from wlora.storage.records import RecordStore

# The seed that the scripts use for tuning. Its runs are not reported.
TUNE_SEED = 100

# Words in place of a value: the best recorded value, or the next learning rate if the best one is at the grid's edge.
WORDS = ("tuned", "beyond")

# Seconds between two looks at runs of other processes.
_BETWEEN_LOOKS = 5.0

_ENVIRONMENT = ("precision", "task.version", "numerics")

Parts = tuple[str, ...]
Agreeing = frozenset[tuple[str, Hashable]]
# Prefixes of the keys that must agree between a run and the runs used for tuning: on the same task, and on another task.
_WHOLE: Parts = ("",)
_ELSEWHERE: Parts = ("method.", "model.", "compat")


@dataclass(frozen=True)
class Choice:
    """The chosen point (learning rates and warm-up) of one setting.

    Attributes:
        point: the best point on the tuning seed.
        seed: the tuning seed.
        tried: all points compared on that seed, including diverged ones and those that a race has stopped.
        raced: whether a race has stopped any of them.
    """

    point: Point
    seed: int
    tried: tuple[Point, ...]
    raced: bool = False

    @property
    def compared(self) -> int:
        """Number of compared points."""
        return len(self.tried)

    def edges(self) -> dict[str, str]:
        """Return the keys whose chosen value is the `smallest` or `largest` of several tried values."""
        found = {}
        for key, value in self.point._asdict().items():
            tried = {other for point in self.tried if (other := getattr(point, key)) is not None}
            if len(tried) > 1 and value in (min(tried), max(tried)):
                found[key] = "smallest" if value == min(tried) else "largest"
        return found

    def beyond(self) -> float:
        """Return the learning rate that extends the grid if the best value is at an edge; otherwise the best value.

        The ratios of the grid repeat, so that 3e-4, 1e-3, 3e-3 is followed by 1e-2.
        """
        rates = sorted({point.lr for point in self.tried})
        if len(rates) < 2 or "lr" not in self.edges():
            return self.point.lr
        if self.point.lr == rates[0]:
            rates.reverse()
        ratio = rates[-2] / rates[-3] if len(rates) > 2 else rates[-1] / rates[-2]
        return float(f"{rates[-1] * ratio:.2g}")

    def value(self, key: str, word: str) -> Any:
        """Return the value of a key for which the user wrote `word`, which is `tuned` or `beyond`."""
        return self.beyond() if word == "beyond" else getattr(self.point, key)

    def describe(self, keys: Iterable[str]) -> str:
        """Format the chosen values as command-line arguments, with a note if a value is the smallest or largest tried."""
        edges = self.edges()
        words = [
            f"{key}={show(getattr(self.point, key))}" + (f" (the {edges[key]} tried)" if key in edges else "")
            for key in keys
        ]
        return " ".join(words)

    def reported(self, runs: Iterable[Run]) -> list[Run]:
        """Return the ended runs at the chosen point, sorted by seed.

        A run on the tuning seed is left out if there are others, several points were compared on it, and that seed is
        `TUNE_SEED` or the largest. Otherwise it is included, as in studies tuned on seed 0 and reported on seeds 0 to 2.
        """
        found = sorted((run for run in runs if run.status in ENDED and run.point == self.point), key=lambda run: run.seed)
        others = [run for run in found if run.config_seed != self.seed]
        apart = others and self.compared > 1 and (self.seed == TUNE_SEED or self.seed > others[-1].config_seed)
        return others if apart else found


def choose_point(runs: Collection[Run]) -> Choice | None:
    """Choose the best point among the ended runs of one setting; None if no run succeeded.

    A run that a race has stopped counts as tried. It cannot be chosen, because better runs continued.

    The tuning seed is `TUNE_SEED` if it has runs at several points; otherwise it is the seed with most points, and among
    these the lowest. Seeds without a success are left out. Runs of other seeds at the chosen point therefore do not change
    the choice. The best primary metric on the dev set wins, or with folds the best mean over them. In a tie, lower rates and
    shorter warm-up win.
    """
    points: dict[int, dict[Point, list[Run]]] = {}
    for run in runs:
        if run.status in TRIED:
            points.setdefault(run.config_seed, {}).setdefault(run.point, []).append(run)
    known = {run.config_seed for run in runs if run.status == "success"}
    if not known:
        return None
    meant = TUNE_SEED in known and len(points[TUNE_SEED]) > 1
    seed = TUNE_SEED if meant else max(known, key=lambda seed: (len(points[seed]), -seed))
    scores = {point: [run.score for run in folds if run.status == "success"] for point, folds in points[seed].items()}
    complete = max(map(len, scores.values()))
    means = {point: sum(folds) / complete for point, folds in scores.items() if len(folds) == complete}
    best = max(means, key=lambda point: (means[point], *(-(value or 0) for value in point)))
    raced = any(run.status == "stopped" for folds in points[seed].values() for run in folds)
    return Choice(best, seed, tuple(points[seed]), raced)


def wanted_keys(config: Config) -> list[str]:
    """Return the keys of a configuration whose value is one of `WORDS`."""
    return [key for key in Point._fields if getattr(config, key) in WORDS]


class Settings:
    """The runs of a study, grouped by the fields that must agree for tuning, for fast look-up.

    Args:
        runs: all runs of a study.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self._groups: dict[tuple[str, Parts, Agreeing], list[Run]] = {}
        names: dict[tuple[int, str], list[tuple[str, Parts, Agreeing]]] = {}
        for run in runs:
            # Runs of one setting share the same object (`wlora.analysis.study.read_study`), so few objects are compared.
            known = (id(run.setting), run.task)
            if known not in names:
                names[known] = [(run.task, parts, _agreeing(run.setting, parts)) for parts in (_WHOLE, _ELSEWHERE)]
            for name in names[known]:
                self._groups.setdefault(name, []).append(run)

    def same(self, config: Config, *, task_data: str | None, model_data: str | None, task: str | None = None) -> list[Run]:
        """Return the runs that differ from a configuration only in point, seed, precision or version.

        Args:
            config: a resolved configuration; its point may be `tuned`.
            task_data: content fingerprint of local or generated data, None for the hub.
            model_data: content fingerprint of local weights, None for the hub.
            task: another task, whose data and number of steps need not agree; None for the configuration's own task.
        """
        own = name_rows(asdict(config.task))
        task = own if task in (None, config.task.name) else task
        assert task is not None
        parts = _WHOLE if task == own else _ELSEWHERE
        fields = scientific_fields(config, task_data=task_data, model_data=model_data, precision="")
        return self._groups.get((task, parts, _agreeing(without_point(fields), parts)), [])

    def candidates(self, config: Config, *, task_data: str | None, model_data: str | None) -> list[Run]:
        """Return the runs to choose from for `tuned`: those of the same setting, on the task `tune_on` if it is set.

        Runs of several precisions or versions are not compared: those of the requested precision count, or else those of
        the precision and version with most runs.

        Raises:
            ConfigError: the runs on `tune_on` have several settings.
        """
        same = self.same(config, task_data=task_data, model_data=model_data, task=config.tune_on)
        require_one_setting(same, f"tune_on={config.tune_on}", ignore=_ENVIRONMENT)
        groups: dict[tuple[str, ...], list[Run]] = {}
        for run in same:
            groups.setdefault(tuple(repr(run.setting.get(key)) for key in _ENVIRONMENT), []).append(run)

        def fits(name: tuple[str, ...]) -> tuple[bool, int, tuple[str, ...]]:
            return name[0] == repr(config.precision), len(groups[name]), name

        return groups[max(groups, key=fits)] if groups else []


def fill_tuned(config: Config, *, task_data: str | None, model_data: str | None) -> Choice | None:
    """Replace `tuned` and `beyond` by recorded values (`choose_point`); return None if no key has one of them.

    While other processes execute runs that may change the choice, a run waits for them; a dry run says so.

    Raises:
        ConfigError: there is no record to choose from, a record is damaged (it may be the best one), or the records on
            `tune_on` have several settings.
    """
    wanted = wanted_keys(config)
    if not wanted:
        if config.tune_on is not None:
            raise ConfigError(f"tune_on={config.tune_on}: allowed is null, as nothing is tuned")
        return None
    asked = f"{wanted[0]}={getattr(config, wanted[0])}"
    while True:
        held = dict(RunLock.all_held(config.results_dir))  # first the locks: a run that ends now is then read as ended
        runs = _candidates(config, asked, task_data=task_data, model_data=model_data)
        choice = choose_point(runs)
        values = {key: choice.value(key, getattr(config, key)) for key in wanted} if choice else {}
        pending = _pending(config.results_dir, held, runs, choice, values)
        if several():  # the processes of one run look at different times, but must wait equally long and choose the same
            choice, values, pending = from_main((choice, values, pending))
        if pending is None or config.dry_run:
            break
        tell(f"{asked}: waiting, because {pending}")
        time.sleep(_BETWEEN_LOOKS)
    if pending is not None:
        tell(f"{asked}: {pending}, so the best is not known yet")
    if choice is None:
        task = config.tune_on or config.task.name
        raise ConfigError(
            f"{asked}: {config.results_dir} has no finished run of method={config.method['name']} in this setting on "
            f"task={task}\nway out: run a grid first, as in -m task={task} lr=5e-5,5e-4,5e-3"
        )
    for key, value in values.items():
        setattr(config, key, value)
    return choice


def _candidates(config: Config, asked: str, *, task_data: str | None, model_data: str | None) -> list[Run]:
    """Read the runs to choose from (`Settings.candidates`); raise ConfigError if a record is damaged."""
    task, method = config.tune_on or config.task.name, str(config.method["name"])
    kinds = {(name, method) for name in (task, task.removesuffix("_own"))}
    runs, faults = read_study(config.results_dir, kinds) if os.path.isdir(config.results_dir) else ([], [])
    if faults:
        raise ConfigError(
            f"{asked}: {faults[0]}, so the best is not known\n"
            "way out: repeat that run with the command of its study, or remove its files"
        )
    return Settings(runs).candidates(config, task_data=task_data, model_data=model_data)


def _pending(
    results_dir: str, held: Mapping[str, RunLock], runs: Iterable[Run], choice: Choice | None, values: Mapping[str, Any]
) -> str | None:
    """Name a run of some process whose result may change the choice; None if there is none.

    Args:
        results_dir: folder of the study.
        held: the locks that were held before the runs were read.
        runs: the runs to choose from.
        choice: the choice among the ended ones.
        values: the values that it gives. A run that has them cannot change them.
    """
    mine, store = {run.record.run_id: run for run in runs}, RecordStore(results_dir)
    for run_id, lock in held.items():
        run = mine.get(run_id)
        if run is None and not store.path(run_id).exists():
            return f"{lock.holder()} is preparing {run_id}"  # it may be one of the setting
        if run is None or run.status in TRIED or (choice and run.config_seed not in (choice.seed, TUNE_SEED)):
            continue
        if choice is None or any(getattr(run.point, key) != value for key, value in values.items()):
            return f"{lock.holder()} is running {run_id} (seed={run.config_seed} lr={show(run.point.lr)})"
    return None


def _agreeing(setting: dict[str, Any], parts: Parts) -> Agreeing:
    """Return the fields that must agree between two settings for one to be tuned by the other."""
    kept = {key: value for key, value in setting.items() if key.startswith(parts) and key not in _ENVIRONMENT}
    return frozenset((key, _hashable(value)) for key, value in kept.items())


def _hashable(value: Any) -> Hashable:
    if isinstance(value, dict):
        return frozenset((key, _hashable(inner)) for key, inner in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
