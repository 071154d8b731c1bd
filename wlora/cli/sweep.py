"""Entry point: `python -m wlora.sweep < FILE`: the runs of sweeps, which are done, and the time that the rest takes.

Every input line contains the arguments of one `python -m wlora.run -m` command. No run is executed; torch is not imported.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wlora.analysis.racing import Entrant, divide, judge, read_entrant, work_left
from wlora.analysis.study import ENDED, Point, name_rows, read_value, seeds_of
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tuning import WORDS, Choice, Settings, choose_point, wanted_keys
from wlora.cli.entry import serve
from wlora.config.presets import KEYED_BY, apply_presets
from wlora.config.rules import RULES, satisfies
from wlora.config.schema import Config, config_folder, register_schema
from wlora.config.spelling import check_read, explain, quote_texts
from wlora.config.untrusted_yaml import guard_files
from wlora.data.sources import count_train_rows, fingerprint
from wlora.errors import ConfigError, wrong_value
from wlora.experiment.resolve import resolve
from wlora.models.source import locate
from wlora.storage.records import RecordStore
from wlora.training.run_length import make_plan

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# Keys that may differ between the runs of one cell. Everything else is composed once per cell.
_POINT = (*Point._fields, "seed", "tune_on")


class Cell:
    """The runs of one setting: the requested runs, as (point, seed), and the recorded ones.

    Attributes:
        config: the resolved configuration of any run of the cell.
        wanted: the requested runs. A value `tuned` or `beyond` means that the records do not determine it yet.
        done: the requested runs that have ended, and those that were eliminated in a race.
        seconds: expected duration of one run on one process; None if no run of the model is recorded.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.wanted: set[tuple[Point, int]] = set()
        self._data = {"task_data": fingerprint(config.task), "model_data": locate(config.model).fingerprint}
        self.read()
        self._choices: dict[str | None, Choice | None] = {}
        self.seconds = expected_seconds(config, self._study.paces)

    @property
    def done(self) -> set[tuple[Point, int]]:
        """The requested runs that need no more steps."""
        if self.config.race == "off":
            return {(run.point, run.seed) for run in self.recorded if run.status in ENDED} & self.wanted
        races = [(asked, race, judge(race)) for asked, race in self.races()]
        return self.wanted - {asked[i] for asked, race, now in races for i in now.alive if not race[i].ended}

    @property
    def left(self) -> int:
        """Number of requested runs that are not done."""
        return len(self.wanted) - len(self.done)

    @property
    def seconds_left(self) -> float | None:
        """Expected duration of the runs that are not done, on one process; None if that of one run is not known."""
        runs = self.left if self.config.race == "off" else sum(work_left(race) for _, race in self.races())
        return None if self.seconds is None else self.seconds * runs

    def races(self) -> list[tuple[list[tuple[Point, int]], list[Entrant]]]:
        """Return the requested runs of each seed, from lower to higher rates, with the state of each in its race."""
        for run in self.recorded:
            asked = run.point, run.seed
            if asked in self.wanted - self._entrants.keys() and self.config.precision in ("auto", run.setting["precision"]):
                self._entrants[asked] = read_entrant(RecordStore(self.config.results_dir), run)
        return divide(self.wanted, self._entrants)

    def read(self) -> None:
        """Read the records again (`read_records`)."""
        self._study = read_records(Path(self.config.results_dir))
        self.recorded = self._study.settings.same(self.config, **self._data)
        self._entrants: dict[tuple[Point, int], Entrant] = {}

    def add(self, points: Iterable[dict[str, str]]) -> None:
        """Request more runs.

        Raises:
            ConfigError: `wlora.run` would reject a point.
        """
        for words in points:
            config = self.place(words)
            own = config.tune_on in (None, config.task.name)
            if wanted_keys(config) and own and self._covers(config):
                continue  # `tuned` will be a point of the grid that is requested anyway, `beyond` perhaps one more
            self.wanted |= {(asked_run(config)[0], seed) for seed in seeds_of(config)}

    def place(self, words: dict[str, str]) -> Config:
        """Return the configuration of a run, `tuned` and `beyond` replaced if the records determine them.

        Raises:
            ConfigError: `wlora.run` would reject it.
        """
        values: dict[str, Any] = {key: read_value(word) for key, word in words.items()}
        config = dataclasses.replace(self.config, **values)
        wanted = wanted_keys(config)
        if wanted and (choice := self._choose(config)) is not None:
            config = dataclasses.replace(config, **{key: choice.value(key, getattr(config, key)) for key in wanted})
        _check(config)
        return config

    def _choose(self, config: Config) -> Choice | None:
        """Return the values for `tuned`. Within a cell they depend only on `tune_on`, so they are cached."""
        if config.tune_on not in self._choices:
            self._choices[config.tune_on] = choose_point(self._study.settings.candidates(config, **self._data))
        return self._choices[config.tune_on]

    def _covers(self, config: Config) -> bool:
        """Tell whether an already requested run with the same seed may become identical once `tuned` is replaced."""
        mine, asked = asked_run(config)[0], (point for point, seed in self.wanted if seed in seeds_of(config))
        return any(all(own in (*WORDS, value) for own, value in zip(mine, point, strict=True)) for point in asked)


def asked_run(config: Config) -> tuple[Point, int]:
    """Return the point and seed of a run, which identify it within a cell."""
    return Point(config.lr, config.warmup, config.head_lr), seeds_of(config)[0]


def _check(config: Config) -> None:
    """Reject values that `wlora.run` would reject: values that violate their rule, and a warm-up longer than the run."""
    for key in (key for key in _POINT if key in RULES):
        if not satisfies(getattr(config, key), RULES[key]):
            raise wrong_value(key, getattr(config, key), RULES[key])
    rows = _rows(config)
    if rows is not None and config.warmup not in WORDS:
        make_plan(config, rows)


class Study(NamedTuple):
    """Data from the records of a results folder, shared by all cells.

    Attributes:
        settings: the runs grouped by setting.
        paces: median seconds per training example of the successful runs, by (model, task, method), by (model, task) and by
            (model,).
    """

    settings: Settings
    paces: dict[tuple[str, ...], float]


@functools.lru_cache
def read_records(folder: Path) -> Study:
    """Read a results folder. The result is cached, so callers must clear the cache to see later records."""
    runs = read_runs(folder) if os.path.isdir(folder) else []
    paces: dict[tuple[str, ...], list[float]] = {}
    for run in runs:
        if run.status == "success" and run.record.steps.get("total"):
            batch = run.record.config["task"]["batch_size"] * run.record.config["train"]["accumulation_steps"]
            pace = run.record.seconds["total"] / (run.record.steps["total"] * batch)
            for kind in _kinds(run.model, run.task, run.method):
                paces.setdefault(kind, []).append(pace)
    return Study(Settings(runs), {kind: statistics.median(found) for kind, found in paces.items()})


def _kinds(model: str, task: str, method: str) -> tuple[tuple[str, ...], ...]:
    """Return the keys into `Study.paces` for a run, the most specific one first."""
    return (model, task, method), (model, task), (model,)


def expected_seconds(config: Config, paces: dict[tuple[str, ...], float]) -> float | None:
    """Estimate the duration of a run in seconds from the recorded seconds per training example of the most similar runs.

    Returns None if no run of the model is recorded or the number of training rows is unknown.
    """
    examples = _examples(config)
    kinds = _kinds(config.model.name, name_rows(dataclasses.asdict(config.task)), config.method["name"])
    pace = next((paces[kind] for kind in kinds if kind in paces), None)
    return None if pace is None or examples is None else examples * pace


def _examples(config: Config) -> int | None:
    rows = _rows(config)
    if rows is None:
        return None
    plan = make_plan(dataclasses.replace(config, warmup=None), rows)
    return plan.total_steps * plan.batch_size * plan.accumulation_steps


def _rows(config: Config) -> int | None:
    """Return the number of training rows according to the configuration; None if it is unknown."""
    rows = count_train_rows(config.task)
    return config.task.max_train_rows if rows is None else rows


USAGE = """\
usage: python -m wlora.sweep key=value,value ...
       python -m wlora.sweep < FILE

Prints the runs of a sweep, how many of them are done, and the time that the rest takes. No run is executed. The arguments
are those of python -m wlora.run -m; a file contains the arguments of one sweep per line."""


def main(words: Sequence[str] | None = None) -> None:
    """Print one line per cell and the total. Exit codes: 0 success, 2 wrong arguments."""
    serve(_tell, USAGE, words, alone=True)


def _tell(words: Sequence[str]) -> None:
    given = [word for word in words if word not in ("-m", "--multirun")]
    cells = survey([given] if words else (_split(line) for line in sys.stdin if line.strip()))
    for cell in cells:
        print(_line(cell))
    left, total = sum(cell.left for cell in cells), sum(len(cell.wanted) for cell in cells)
    unknown = sum(cell.left for cell in cells if cell.seconds is None)
    seconds = sum(cell.seconds_left or 0 for cell in cells)
    print(f"{total - left} of {total} runs done; {duration(seconds)} left on one process", end="")
    print(f", not counting {unknown} runs of unknown length" if unknown else "")


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError(
            f"{line.strip()[:80]}: cannot be split into words ({error}): allowed are balanced quotes"
        ) from None


def survey(sweeps: Iterable[Sequence[str]]) -> list[Cell]:
    """Expand sweeps into cells and compare them with the records of their results folders.

    Raises:
        ConfigError: `wlora.run` would reject a sweep.
    """
    cells: dict[tuple[str, ...], Cell] = {}
    for words in sweeps:
        parts = list(expand(quote_texts(words)))
        check_read([overrides for overrides, _ in parts], _compose)
        for overrides, points in parts:
            key = tuple(sorted(overrides))
            if key not in cells:
                cells[key] = Cell(compose(overrides))
            cells[key].add(points)
    return list(cells.values())


def expand(words: Sequence[str]) -> Iterator[tuple[list[str], list[dict[str, str]]]]:
    """Yield, for every cell of a sweep, its overrides and the values of the keys in `_POINT` for each of its runs."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    ours = [word for word in words if not word.startswith("hydra")]
    # If a key is given twice, the last value is used, as in Hydra.
    try:
        parsed = OverridesParser.create().parse_overrides([*_sweep_in_file(words), *ours])
    except HydraException as error:
        raise ConfigError(explain(error, words)) from None
    last = {override.key_or_group: override for override in parsed}
    point = [override for key, override in last.items() if key in _POINT]
    rest = [override for key, override in last.items() if key not in _POINT]
    points = [dict(word.split("=", 1) for word in job) for job in BasicSweeper.split_arguments(point, None)[0]]
    for overrides in BasicSweeper.split_arguments(rest, None)[0]:
        yield list(overrides), points


def _sweep_in_file(words: Sequence[str]) -> list[str]:
    """Return the sweep that is defined in an experiment file (`hydra.sweeper.params`)."""
    return [found for word in words if word.startswith("experiment=") for found in _params_of(word)]


@functools.lru_cache
def _params_of(experiment: str) -> list[str]:
    from hydra.errors import HydraException

    try:
        params = _compose_by_hydra([experiment], return_hydra_config=True).hydra.sweeper.params
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, [experiment])) from error
    return [f"{key}={value}" for key, value in params.items()] if params else []


def compose(overrides: Sequence[str]) -> Config:
    """Compose and resolve a configuration in the same way as `wlora.run`.

    Raises:
        ConfigError: the configuration is invalid.
    """
    words = quote_texts(overrides)
    composed = _compose(words)
    apply_presets(composed, words)
    config: Any = OmegaConf.to_object(composed)
    return resolve(config)


def _compose(overrides: Sequence[str]) -> DictConfig:
    """Compose a configuration as Hydra does: first the group choices, which are cached, then the other overrides.

    The next call may reuse and overwrite the returned object, so callers must not keep it.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.errors import HydraException

    try:
        parsed = [_parse(word) for word in overrides]
        groups = tuple(p.input_line for p in parsed if _chooses_group(p))
        rest = [p for p in parsed if not _chooses_group(p)]
        # Copying takes most of the time. The cells of a sweep set the same keys, so one copy can be overwritten each time.
        again = all(map(_overwrites, rest)) and not _has_preset(_compose_groups(groups))
        composed = _shared_copy(groups, tuple(p.key_or_group for p in rest)) if again else _copy(groups)
        ConfigLoaderImpl._apply_overrides_to_config(rest, composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, overrides)) from error
    return composed


def _overwrites(override: Override) -> bool:
    """Tell whether an override replaces only one value. A preset does not: it sets more keys and is then reset to null."""
    from hydra.core.override_parser.types import OverrideType

    single = override.type == OverrideType.CHANGE and not isinstance(override.value(), dict | list)
    return single and not override.key_or_group.endswith(".preset")


def _has_preset(composed: DictConfig) -> bool:
    return any(composed[group].get("preset") is not None for group in KEYED_BY)


def _copy(groups: tuple[str, ...]) -> DictConfig:
    return copy.deepcopy(_compose_groups(groups))


@functools.lru_cache(maxsize=64)
def _shared_copy(groups: tuple[str, ...], keys: tuple[str, ...]) -> DictConfig:
    """Return the shared copy for all argument lists that choose these groups and set these keys."""
    return _copy(groups)


@functools.lru_cache(maxsize=4096)
def _parse(word: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([word])
    return override


def _chooses_group(override: Override) -> bool:
    """Tell whether an override chooses a file of a group (`task=sst2`) instead of setting a key. This is Hydra's rule."""
    return _is_group(override.key_or_group) and not isinstance(override.value(), dict)


@functools.lru_cache(maxsize=4096)
def _is_group(name: str) -> bool:
    return os.path.isdir(config_folder() / name)


@functools.lru_cache(maxsize=64)
def _compose_groups(words: tuple[str, ...]) -> DictConfig:
    """Compose the given group choices. The result is cached, so callers must copy it before changing it."""
    return _compose_by_hydra(words)


def _compose_by_hydra(words: Sequence[str], **options: bool) -> DictConfig:
    from hydra import compose, initialize_config_dir

    register_schema()
    guard_files()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        composed: DictConfig = compose("config", overrides=list(words), **options)
        return composed


def duration(seconds: float) -> str:
    """Format a duration: `3 h 20 min`, `2 min`, `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _line(cell: Cell) -> str:
    config, method = cell.config, cell.config.method
    names = [f"{key}={method[key]}" for key in ("rank", "k", "targets") if key in method]
    where = " ".join([f"task={config.task.name}", f"model={config.model.name}", f"method={method['name']}", *names])
    rest = "" if not cell.left else ", length unknown" if cell.seconds is None else f", {duration(cell.seconds_left or 0)}"
    how = "" if cell.config.race == "off" else " or eliminated in a race"
    return f"{where}: {len(cell.wanted) - cell.left} of {len(cell.wanted)} runs done{how}{rest}"
