"""One study: the records of one results folder, for tables, figures and tuning. Never imports torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import MISSING, OmegaConf

from wlora.config.identity import later_keys, scientific_fields
from wlora.config.schema import Config, TaskConfig, config_folder, restore_config
from wlora.data.held_out import count_folds
from wlora.errors import ConfigError, unknown_name
from wlora.models.layout import FAMILIES
from wlora.models.targets import count_targets
from wlora.storage.environment import name_machine
from wlora.storage.records import Record


class Point(NamedTuple):
    """The hyperparameters that are tuned.

    Attributes:
        lr: the learning rate.
        warmup: the warm-up; None for the default.
        head_lr: the learning rate of head and pooler; None if it equals `lr`.
    """

    lr: float
    warmup: int | None = None
    head_lr: float | None = None

    def columns(self) -> dict[str, float | int | None]:
        """Return the values by key. `head_lr` is included only if it is set, because most studies do not use it."""
        return {key: value for key, value in self._asdict().items() if key != "head_lr" or value is not None}


ENDED = ("success", "diverged")
"""A run with one of these statuses has its final result. More steps or another attempt would not change it."""

TRIED = (*ENDED, "stopped")
"""A run with one of these statuses counts as tried when points are compared. A run stopped by a race was eliminated."""

_NAMES = ("task", "model", "method")

FOLD_STRIDE = 1000
"""With `task.validation=folds=N`, each fold counts as a seed: fold 2 of seed 0 is 2, and fold 2 of seed 1 is 1002."""


@dataclass(frozen=True)
class Run:
    """A record with its setting. Runs may be averaged only if their settings are equal.

    Attributes:
        record: the record.
        setting: all scientific fields except those of `Point` and the seed, with dotted keys (`task.epochs`, `method.k`),
            and the versions of data and program (`task.version`, `wlora`).
    """

    record: Record
    setting: dict[str, Any] = field(repr=False)

    @property
    def status(self) -> str:
        """How the run ended."""
        return self.record.status

    @cached_property
    def task(self) -> str:
        """Name of the task's rows (`name_rows`)."""
        return name_rows(self.record.config["task"])

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.record.config["model"]["name"])

    @property
    def family(self) -> str | None:
        """The model's `model_type` in transformers; None if it is not recorded."""
        return (self.record.config["model"].get("architecture") or {}).get("model_type")

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.record.config["method"]["name"])

    @property
    def seed(self) -> int:
        """The number that distinguishes runs with equal setting and point: the seed, combined with the fold if any."""
        return _with_fold(self.config_seed, self.record.config["task"].get("fold"))

    @property
    def config_seed(self) -> int:
        """The seed of the configuration, which all folds of a run share."""
        return int(self.record.config["seed"])

    @property
    def point(self) -> Point:
        """Learning rates and warm-up."""
        return Point(self.record.config["lr"], self.record.config["warmup"], self.record.config.get("head_lr"))

    @property
    def rank(self) -> int | None:
        """The rank at which the method is compared with others; None for a method without adapters."""
        # VeRA's own rank is the rank of its shared matrices, which is not comparable.
        rank = self.record.config["rank"] if self.method == "vera" else self.record.config["method"].get("rank")
        return None if rank is None else int(rank)

    @property
    def k(self) -> int | None:
        """The requested number of adapters; None for a method that does not use `k`."""
        method = self.record.config["method"]
        return int(method["k"]) if "k" in method and method.get("schedule", "single") == "single" else None

    @cached_property
    def n(self) -> int | None:
        """The number of adapters at the start; None if unknown."""
        cuts = [event["omega"] for event in self.record.events if event["kind"] in ("cut", "select") and "omega" in event]
        if cuts:
            return len(cuts[0])
        targets = self.record.config["method"].get("targets")
        # Do not use the model's folder, which may be missing on this machine.
        architecture = self.record.config["model"].get("architecture")
        # Counting the targets of other families would require torch.
        known = targets and self.family in FAMILIES
        return count_targets(architecture, targets) if known else None

    @property
    def machine(self) -> str:
        """Name of the hardware."""
        return name_machine(self.record.environment)

    @property
    def trained(self) -> int:
        """Number of trained parameters at the end as the paper counts them: the head only for full fine-tuning."""
        counts = self.record.parameters
        return int(counts["adapter_final"] + (counts["base"] + counts["head"] if counts["base"] else 0))

    @cached_property
    def score(self) -> float:
        """The primary metric of a successful run."""
        return self.record.metrics[self.record.primary_metric]


def _with_fold(seed: int, fold: int | None) -> int:
    return seed if fold is None else seed * FOLD_STRIDE + fold


def seeds_of(config: Config) -> list[int]:
    """Return the values of `Run.seed` for the runs of a configuration: one value, or one per fold."""
    folds = count_folds(config.task) if config.task.fold is None else None
    return [_with_fold(config.seed, fold) for fold in (range(folds) if folds else [config.task.fold])]


# Keys that define a task's rows. The source keys count only without `task.path`, which may be a local copy.
_SCHEMA = ("kind", "benchmark", "columns", "labels", "validation", "metrics", "unanswerable")
_SOURCE = ("hub_id", "subset", "generator")


def name_rows(task: Mapping[str, Any]) -> str:
    """Return the name of a task's rows for tables: NAME, or NAME_own if they are not the rows of the benchmark NAME.

    The rows are not the benchmark's if schema or source differ from the task's YAML, for example after `task.columns=...`.
    A table must not print them as results of the benchmark. An own table without a name is named after its file or
    repository.
    """
    name = str(task["name"])
    if task.get("benchmark") == "table" and shipped_task(name):
        return Path(str(task.get("path") or task.get("hub_id") or name)).stem
    benchmark = shipped_task(name)
    keys = _SCHEMA if task.get("path") else _SCHEMA + _SOURCE
    own = benchmark and any(key in task and task[key] != benchmark[key] for key in keys)
    return f"{name}_own" if own else name


@cache
def shipped_task(name: str) -> dict[str, Any]:
    """Return the keys in a task's YAML file; empty if the task has none."""
    file = config_folder() / "task" / f"{name}.yaml"
    if not re.fullmatch(r"[\w-]{1,200}", name) or not file.is_file():
        return {}
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    return {**asdict(TaskConfig()), **content}


def read_words(
    words: Sequence[str], options: dict[str, str | None]
) -> tuple[list[str], dict[str, str | None], dict[str, str]]:
    """Split a command line into names, options (`key=value` with a known key; defaults are added) and filters.

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
    versions = {"task.version": None if local else data, "numerics": record.environment.get("numerics", 1)}
    return {**without_point(fields), **versions}


def main_model(runs: Iterable[Run], favourite: str | None = None) -> str | None:
    """Return the model to show: the favourite if it has successful runs, else the one with most; None without any."""
    counts = Counter(sorted(run.model for run in runs if run.status == "success"))
    return favourite if favourite in counts else next((model for model, _ in counts.most_common(1)), None)


def require_one_setting(
    runs: Sequence[Run], where: str, *, part: str = "", but: str | None = None, ignore: Sequence[str] = ()
) -> None:
    """Raise an error for runs that differ in more than point and seed, because they must not be averaged or compared.

    If only some runs have a key, the others have its default, because they were recorded before the key was added, or null,
    because they do not use it.

    Args:
        runs: the runs to average or compare.
        where: description of the runs for the message.
        part: check only fields with this prefix.
        but: skip fields with this prefix.
        ignore: fields that may differ.

    Raises:
        ConfigError: the settings differ. The message names the fields, their values, and how to choose.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in sorted({key for run in runs for key in run.setting}):
        if key.startswith(part) and key not in ignore and not (but and key.startswith(but)):
            has = {run.method for run in runs if key in run.setting}
            values = [lookup(run, key)[1] for run in runs if run.method in has or not key.startswith("method.")]
            found[key] = {repr(value): value for value in values}
    mixed = {key: [values[text] for text in sorted(values)] for key, values in found.items() if len(values) > 1}
    if mixed:
        listed = "; ".join(f"{key}: {' | '.join(show(value) for value in values)}" for key, values in sorted(mixed.items()))
        key, values = sorted(mixed.items())[0]
        raise ConfigError(f"{where}: runs of different settings ({listed})\nway out: choose, as in {key}={show(values[0])}")


def require_distinct_seeds(runs: Sequence[Run], where: str) -> None:
    """Raise an error for two finished runs with equal setting, point and seed. One was copied or made by other code.

    Raises:
        ConfigError: the message names the two records.
    """
    seen: dict[tuple[Point, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.point, run.seed), run)
        if other is not run:
            raise ConfigError(
                f"{where}: seed={run.seed} exists twice, as records {other.record.run_id} and {run.record.run_id}\n"
                "way out: remove one of them"
            )


def select(runs: Iterable[Run], filters: dict[str, str]) -> list[Run]:
    """Keep the runs whose configuration has one of the values given for every key, as in `task=sst2,mrpc seed=0`.

    Keys are those of the configuration. `task`, `model` and `method` are compared with names; `wlora`, `task.version` and
    `task.data` with the values in `Run.setting`. A run is kept if no run of its method has the key. A record older than the
    key has the key's default. If only other runs of the method have the key, its value is null.

    Raises:
        ConfigError: no record has the key.
    """
    kept = list(runs)
    for key, text in filters.items():
        words = text.split(",")
        allowed, spelled = [read_value(word) for word in words], {text, *words}
        values = [lookup(run, key) for run in kept]
        has = {run.method for run, (found, _) in zip(kept, values, strict=True) if found}
        if kept and not has:
            parent = key.rpartition(".")[0]
            names = {name for run in kept for name in (*run.record.config, *run.setting)}
            raise unknown_name(f"{key}={text}", key, {name for name in names if name.rpartition(".")[0] == parent} or names)
        kept = [
            run
            for run, (_, value) in zip(kept, values, strict=True)
            if run.method not in has or value in allowed or show(value) in spelled  # a name may look like a number
        ]
    return kept


def read_value(text: str) -> Any:
    """Convert a command-line value to a number, None, True or False; any other text is returned unchanged."""
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
    """Format a value for the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def lookup(run: Run, key: str) -> tuple[bool, Any]:
    """Return whether a run has a key, and its value. A record older than the key has the key's default."""
    if key in _NAMES:
        return True, getattr(run, key)
    if key in run.setting:
        return True, run.setting[key]
    value: Any = run.record.config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            name = key.removeprefix("method.")
            implied = _defaults() if name == key else later_keys(run.method)
            return name in implied, implied.get(name)
        value = value[part]
    return True, value


@cache
def _defaults() -> dict[str, Any]:
    """Return the default of every key outside the methods that has one."""
    flat = flatten(asdict(Config()))
    return {key: value for key, value in flat.items() if value != MISSING and not key.startswith("method.")}


def without_point(fields: dict[str, Any]) -> dict[str, Any]:
    flat = flatten({key: value for key, value in fields.items() if key not in ("version", "seed", *Point._fields)})
    flat.pop("task.fold", None)  # folds are averaged, as seeds are
    return flat


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
