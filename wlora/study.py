"""One study: the records of one results folder, as tables, figures and tuning read them. Never imports torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wlora.config import Config, restore_config, scientific_fields
from wlora.environment import name_machine
from wlora.errors import ConfigError, unknown_name
from wlora.records import Record, RecordStore

Point = tuple[float, int | None]
"""What is tuned: learning rate and warm-up (None: the default)."""

ENDED = ("success", "diverged")
"""A run with one of these has its result: more steps or another try would not change it."""

_NAMES = ("task", "model", "method")
_ENVIRONMENT = ("precision", "task.version", "wlora")


@dataclass(frozen=True)
class Run:
    """A record, with what has to agree before it may be averaged with another.

    Attributes:
        record: the record.
        setting: every scientific field but learning rate, warm-up and seed, flat (`task.epochs`, `method.k`), and the
            versions of data and program (`task.version`, `wlora`).
    """

    record: Record
    setting: dict[str, Any] = field(repr=False)

    @property
    def status(self) -> str:
        """How the run ended."""
        return self.record.status

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.record.config["task"]["name"])

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.record.config["model"]["name"])

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.record.config["method"]["name"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.record.config["seed"])

    @property
    def point(self) -> Point:
        """Learning rate and warm-up."""
        return self.record.config["lr"], self.record.config["warmup"]

    @property
    def rank(self) -> int | None:
        """The rank at whose budget the method is compared, None for a method without adapters."""
        # VeRA's own rank is that of its shared matrices.
        rank = self.record.config["rank"] if self.method == "vera" else self.record.config["method"].get("rank")
        return None if rank is None else int(rank)

    @property
    def k(self) -> int | None:
        """The number of adapters asked for, None for a method that does not read `k`."""
        method = self.record.config["method"]
        return int(method["k"]) if "k" in method and method.get("schedule", "single") == "single" else None

    @property
    def machine(self) -> str:
        """What it ran on."""
        return name_machine(self.record.environment)

    @cached_property
    def score(self) -> float:
        """The primary metric of a run that succeeded."""
        return self.record.metrics[self.record.primary_metric]


@dataclass(frozen=True)
class Choice:
    """The learning rate and warm-up chosen for one setting.

    Attributes:
        point: the best on the tuning seed.
        seed: the tuning seed.
        compared: how many points were compared there, diverged ones included.
    """

    point: Point
    seed: int
    compared: int


def read_study(results_dir: str | Path) -> tuple[list[Run], list[str]]:
    """Read all records of a study; returns their runs, and what is wrong with the files that hold none.

    Raises:
        ConfigError: the folder does not exist.
    """
    if not Path(results_dir).is_dir():
        raise ConfigError(f"results_dir={results_dir}: allowed is a folder with the records of a study")
    store = RecordStore(results_dir)
    runs, faults = [], []
    for found in store.scan():
        if isinstance(found, ConfigError):
            faults.append(str(found))
            continue
        try:
            runs.append(_whole(Run(found, setting_of(found))))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # One without a checksum, which would have shown the damage.
            faults.append(f"record {store.path(found.run_id)} is damaged: {type(error).__name__} {error}")
    return runs, faults


def _whole(run: Run) -> Run:
    """Return a run of which everything can be asked that a `Run` tells; KeyError, TypeError or ValueError else."""
    for name in ("task", "model", "method", "seed", "point", "rank", "k"):
        getattr(run, name)
    if run.status == "success":
        float(run.score)
    return run


def read_runs(results_dir: str | Path) -> list[Run]:
    """Read all records of a study; what cannot be read is told in a line each and left out.

    Raises:
        ConfigError: the folder does not exist.
    """
    runs, faults = read_study(results_dir)
    for fault in faults:
        print(f"notice: {fault}; it is left out", file=sys.stderr)
    return runs


def read_words(
    words: Sequence[str], options: dict[str, str | None]
) -> tuple[list[str], dict[str, str | None], dict[str, str]]:
    """Split a command line into names, options (`key=value` with a known key, over their defaults) and filters.

    Raises:
        ConfigError: a key without a value.
    """
    names = [word for word in words if "=" not in word]
    given = dict(word.split("=", 1) for word in words if "=" in word)
    for key, value in given.items():
        if not key or not value:
            raise ConfigError(f"{key}={value}: allowed is key=value")
    filters = {key: value for key, value in given.items() if key not in options}
    return names, {key: given.get(key, default) for key, default in options.items()}, filters


def setting_of(record: Record) -> dict[str, Any]:
    """Return the setting of a record (see `Run`)."""
    config = restore_config(record.config)
    data = record.task.get("data")
    local = config.task.path is not None or config.task.generator is not None
    fields = scientific_fields(
        config,
        task_data=data if local else None,
        model_data=record.model.get("fingerprint"),
        precision=record.environment.get("precision", config.precision),
    )
    versions = {"task.version": None if local else data, "wlora": record.environment.get("wlora")}
    return {**_without_point(fields), **versions}


def choose_point(runs: Iterable[Run]) -> Choice | None:
    """Choose learning rate and warm-up among the ended runs of one setting; None if none succeeded.

    The tuning seed is the one with the most points (the lowest of several), so runs of other seeds at the chosen point
    never move the choice. The best primary metric on the dev set wins, at a tie the lower rate and the shorter warm-up.
    """
    points: dict[int, dict[Point, Run]] = {}
    for run in runs:
        if run.status in ENDED:
            points.setdefault(run.seed, {})[run.point] = run
    if not points:
        return None
    seed = max(points, key=lambda seed: (len(points[seed]), -seed))
    succeeded = [run for run in points[seed].values() if run.status == "success"]
    if not succeeded:
        return None
    best = max(succeeded, key=lambda run: (run.score, -run.point[0], -(run.point[1] or 0)))
    return Choice(best.point, seed, len(points[seed]))


def same_setting(
    config: Config, runs: Iterable[Run], *, task_data: str | None, model_data: str | None, task: str | None = None
) -> list[Run]:
    """Return the runs that differ from a configuration in learning rate, warm-up, seed, precision or version alone.

    Args:
        config: a resolved configuration; `lr` and `warmup` may be `tuned`.
        runs: a study's.
        task_data: content fingerprint of local or generated data, None for the hub.
        model_data: content fingerprint of local weights, None for the hub.
        task: another task, whose rows and steps may then be any; None for the configuration's own.
    """
    task = task or config.task.name
    parts = ("",) if task == config.task.name else ("method.", "model.", "compat")
    fields = scientific_fields(config, task_data=task_data, model_data=model_data, precision="")
    own = _shared(_without_point(fields), parts)
    return [run for run in runs if run.task == task and _shared(run.setting, parts) == own]


def choose_tuned(config: Config, runs: Iterable[Run], *, task_data: str | None, model_data: str | None) -> Choice | None:
    """Choose what `tuned` stands for: the best recorded point of the same setting, or of it on the task `tune_on`.

    Raises:
        ConfigError: on `tune_on` there are runs of several settings.
    """
    same = same_setting(config, runs, task_data=task_data, model_data=model_data, task=config.tune_on)
    require_one_setting(same, f"tune_on={config.tune_on}", ignore=_ENVIRONMENT)
    return choose_point(same)


def fill_tuned(config: Config, *, task_data: str | None, model_data: str | None) -> Choice | None:
    """Replace `tuned` in `lr` and `warmup` by recorded values (`choose_tuned`); None where nothing was to be tuned.

    Raises:
        ConfigError: no record to choose from, a damaged one (which may be the best), or records of `tune_on` in more than
            one setting.
    """
    wanted = [key for key in ("lr", "warmup") if getattr(config, key) == "tuned"]
    if not wanted:
        if config.tune_on is not None:
            raise ConfigError(f"tune_on={config.tune_on}: allowed is null, as neither lr nor warmup is tuned")
        return None
    runs, faults = read_study(config.results_dir) if Path(config.results_dir).is_dir() else ([], [])
    if faults:
        raise ConfigError(
            f"{wanted[0]}=tuned: {faults[0]}, so the best is not known\n"
            "way out: the commands of its study do that run again; or remove what is left of it"
        )
    choice = choose_tuned(config, runs, task_data=task_data, model_data=model_data)
    if choice is None:
        task = config.tune_on or config.task.name
        raise ConfigError(
            f"{wanted[0]}=tuned: {config.results_dir} has no finished run of method={config.method['name']} in this "
            f"setting on task={task}\nway out: run a grid first, as in -m task={task} lr=5e-5,5e-4,5e-3"
        )
    for key, value in zip(("lr", "warmup"), choice.point, strict=True):
        if key in wanted:
            setattr(config, key, value)
    return choice


def require_one_setting(
    runs: Sequence[Run], where: str, *, part: str = "", but: str | None = None, ignore: Sequence[str] = ()
) -> None:
    """Refuse runs that differ in more than learning rate, warm-up and seed: they must not be averaged or compared.

    Args:
        runs: what is to be put side by side.
        where: what they are, for the message.
        part: look only at fields that start with this.
        but: and not with this.
        ignore: fields that may differ.

    Raises:
        ConfigError: with the fields that differ, their values, and the way to choose.
    """
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for key, value in run.setting.items():
            if key.startswith(part) and key not in ignore and not (but and key.startswith(but)):
                found.setdefault(key, {})[repr(value)] = value
    mixed = {key: [values[text] for text in sorted(values)] for key, values in found.items() if len(values) > 1}
    if mixed:
        listed = "; ".join(f"{key}: {' | '.join(show(value) for value in values)}" for key, values in sorted(mixed.items()))
        key, values = sorted(mixed.items())[0]
        raise ConfigError(f"{where}: runs of different settings ({listed})\nway out: choose, as in {key}={show(values[0])}")


def require_distinct_seeds(runs: Sequence[Run], where: str) -> None:
    """Refuse two finished runs of one setting, point and seed: one of them was copied or made by other code.

    Raises:
        ConfigError: with the two files.
    """
    seen: dict[tuple[Point, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.point, run.seed), run)
        if other is not run:
            raise ConfigError(
                f"{where}: seed={run.seed} is there twice, as records {other.record.run_id} and {run.record.run_id}\n"
                "way out: remove one of them"
            )


def select(runs: Iterable[Run], filters: dict[str, str]) -> list[Run]:
    """Keep the runs whose configuration has one of the values given for every key, as in `task=sst2,mrpc seed=0`.

    Keys are those of the configuration (`task`, `model` and `method` mean their names, `wlora`, `task.version` and
    `task.data` what `Run.setting` holds). A key that a run's method does not have lets the run pass.

    Raises:
        ConfigError: a key that no record has.
    """
    kept = list(runs)
    for key, text in filters.items():
        allowed = [read_value(word) for word in text.split(",")]
        values = [_lookup(run, key) for run in kept]
        if kept and not any(found for found, _ in values):
            parent = key.rpartition(".")[0]
            names = {name for run in kept for name in (*run.record.config, *run.setting)}
            raise unknown_name(f"{key}={text}", key, {name for name in names if name.rpartition(".")[0] == parent} or names)
        kept = [run for run, (found, value) in zip(kept, values, strict=True) if not found or value in allowed]
    return kept


def read_value(text: str) -> Any:
    """Read a word of the command line: a number, `null`, `true`, `false`, else the word."""
    constants = {"null": None, "true": True, "false": False}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def show(value: Any) -> str:
    """Write a value as the command line takes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _lookup(run: Run, key: str) -> tuple[bool, Any]:
    if key in _NAMES:
        return True, getattr(run, key)
    if key in run.setting:
        return True, run.setting[key]
    value: Any = run.record.config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _without_point(fields: dict[str, Any]) -> dict[str, Any]:
    return flatten({key: value for key, value in fields.items() if key not in ("version", "lr", "warmup", "seed")})


def _shared(setting: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """Return the fields that two settings must share for one to be tuned by the other."""
    return {key: value for key, value in setting.items() if key.startswith(tuple(parts)) and key not in _ENVIRONMENT}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
