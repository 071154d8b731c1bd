"""What `tuned` stands for: learning rates and warm-up chosen among the recorded runs of a setting. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from wlora.analysis.study import ENDED, Point, Run, name_rows, require_one_setting, show, without_point
from wlora.analysis.study_reader import read_study
from wlora.config.identity import scientific_fields
from wlora.config.schema import Config
from wlora.errors import ConfigError

# The seed on which the scripts tune; it is not reported.
TUNE_SEED = 100

_ENVIRONMENT = ("precision", "task.version", "numerics")

Parts = tuple[str, ...]
Agreeing = frozenset[tuple[str, Hashable]]
# What the keys begin with of the fields that must agree: on the run's own task, and on another.
_WHOLE: Parts = ("",)
_ELSEWHERE: Parts = ("method.", "model.", "compat")


@dataclass(frozen=True)
class Choice:
    """The point chosen for one setting.

    Attributes:
        point: the best on the tuning seed.
        seed: the tuning seed.
        tried: the points compared there, diverged ones included.
    """

    point: Point
    seed: int
    tried: tuple[Point, ...]

    @property
    def compared(self) -> int:
        """How many points were compared."""
        return len(self.tried)

    def edges(self) -> dict[str, str]:
        """Return the coordinates whose chosen value is the `smallest` or the `largest` of several tried."""
        found = {}
        for key, value in self.point._asdict().items():
            tried = {other for point in self.tried if (other := getattr(point, key)) is not None}
            if len(tried) > 1 and value in (min(tried), max(tried)):
                found[key] = "smallest" if value == min(tried) else "largest"
        return found

    def describe(self, keys: Iterable[str]) -> str:
        """Write coordinates as the command line takes them, with what is at the edge of those tried."""
        edges = self.edges()
        words = [
            f"{key}={show(getattr(self.point, key))}" + (f" (the {edges[key]} tried)" if key in edges else "")
            for key in keys
        ]
        return " ".join(words)

    def reported(self, runs: Iterable[Run]) -> list[Run]:
        """Return the ended runs at the chosen point, by seed.

        A tuning seed above all others is not reported beside them. One among the others is, as in studies that were tuned
        on seed 0 and reported on seeds 0 to 2.
        """
        found = sorted((run for run in runs if run.status in ENDED and run.point == self.point), key=lambda run: run.seed)
        others = [run for run in found if run.seed != self.seed]
        apart = others and self.compared > 1 and self.seed > others[-1].seed
        return others if apart else found


def choose_point(runs: Iterable[Run]) -> Choice | None:
    """Choose a point among the ended runs of one setting; None if none succeeded on the tuning seed.

    The tuning seed is `TUNE_SEED` where it has run at several points, else the seed with the most (the lowest of several),
    so runs of other seeds at the chosen point never move the choice. The best primary metric on the dev set wins, at a tie
    the lower rates and the shorter warm-up.
    """
    points: dict[int, dict[Point, Run]] = {}
    for run in runs:
        if run.status in ENDED:
            points.setdefault(run.seed, {})[run.point] = run
    if not points:
        return None
    meant = len(points.get(TUNE_SEED, ())) > 1
    seed = TUNE_SEED if meant else max(points, key=lambda seed: (len(points[seed]), -seed))
    succeeded = [run for run in points[seed].values() if run.status == "success"]
    if not succeeded:
        return None
    best = max(succeeded, key=lambda run: (run.score, *(-(value or 0) for value in run.point)))
    return Choice(best.point, seed, tuple(points[seed]))


def wanted_keys(config: Config) -> list[str]:
    """Return the keys of a configuration that are still `tuned`."""
    return [key for key in Point._fields if getattr(config, key) == "tuned"]


class Settings:
    """A study's runs by what has to agree before one may be tuned by another, so that none looks through all of them.

    Args:
        runs: a study's.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self._groups: dict[tuple[str, Parts, Agreeing], list[Run]] = {}
        names: dict[tuple[int, str], list[tuple[str, Parts, Agreeing]]] = {}
        for run in runs:
            # Runs of one setting share it (`wlora.analysis.study.read_study`), so that few are looked at.
            known = (id(run.setting), run.task)
            if known not in names:
                names[known] = [(run.task, parts, _agreeing(run.setting, parts)) for parts in (_WHOLE, _ELSEWHERE)]
            for name in names[known]:
                self._groups.setdefault(name, []).append(run)

    def same(self, config: Config, *, task_data: str | None, model_data: str | None, task: str | None = None) -> list[Run]:
        """Return the runs that differ from a configuration in their point, seed, precision or version alone.

        Args:
            config: a resolved configuration; its point may be `tuned`.
            task_data: content fingerprint of local or generated data, None for the hub.
            model_data: content fingerprint of local weights, None for the hub.
            task: another task, whose rows and steps may then be any; None for the configuration's own.
        """
        own = name_rows(asdict(config.task))
        task = own if task in (None, config.task.name) else task
        assert task is not None
        parts = _WHOLE if task == own else _ELSEWHERE
        fields = scientific_fields(config, task_data=task_data, model_data=model_data, precision="")
        return self._groups.get((task, parts, _agreeing(without_point(fields), parts)), [])

    def choose(self, config: Config, *, task_data: str | None, model_data: str | None) -> Choice | None:
        """Choose what `tuned` stands for: the best recorded point of the same setting, or of it on the task `tune_on`.

        Raises:
            ConfigError: on `tune_on` there are runs of several settings.
        """
        same = self.same(config, task_data=task_data, model_data=model_data, task=config.tune_on)
        require_one_setting(same, f"tune_on={config.tune_on}", ignore=_ENVIRONMENT)
        return choose_point(same)


def fill_tuned(config: Config, *, task_data: str | None, model_data: str | None) -> Choice | None:
    """Replace `tuned` by the recorded values (`Settings.choose`); None where nothing was to be tuned.

    Raises:
        ConfigError: no record to choose from, a damaged one (which may be the best), or records of `tune_on` in more than
            one setting.
    """
    wanted = wanted_keys(config)
    if not wanted:
        if config.tune_on is not None:
            raise ConfigError(f"tune_on={config.tune_on}: allowed is null, as nothing is tuned")
        return None
    task, method = config.tune_on or config.task.name, str(config.method["name"])
    kinds = {(name, method) for name in (task, task.removesuffix("_own"))}
    runs, faults = read_study(config.results_dir, kinds) if os.path.isdir(config.results_dir) else ([], [])
    if faults:
        raise ConfigError(
            f"{wanted[0]}=tuned: {faults[0]}, so the best is not known\n"
            "way out: the commands of its study do that run again; or remove what is left of it"
        )
    choice = Settings(runs).choose(config, task_data=task_data, model_data=model_data)
    if choice is None:
        raise ConfigError(
            f"{wanted[0]}=tuned: {config.results_dir} has no finished run of method={method} in this "
            f"setting on task={task}\nway out: run a grid first, as in -m task={task} lr=5e-5,5e-4,5e-3"
        )
    for key in wanted:
        setattr(config, key, getattr(choice.point, key))
    return choice


def _agreeing(setting: dict[str, Any], parts: Parts) -> Agreeing:
    """Return the fields that two settings must share for one to be tuned by the other."""
    kept = {key: value for key, value in setting.items() if key.startswith(parts) and key not in _ENVIRONMENT}
    return frozenset((key, _hashable(value)) for key, value in kept.items())


def _hashable(value: Any) -> Hashable:
    if isinstance(value, dict):
        return frozenset((key, _hashable(inner)) for key, inner in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
