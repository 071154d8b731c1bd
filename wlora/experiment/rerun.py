"""`python -m wlora.run from=RUN_ID`: a record's run once more, and what came out differently.

The repetition goes to `<results_dir>/reruns`, a study of its own: the record that it is compared with stays as it is, and
no table counts the same run twice.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from wlora.adapters.peft_format import RECORDED
from wlora.config.identity import method_revision
from wlora.config.rules import check_rules
from wlora.config.schema import Config, restore_config, walk
from wlora.data.sources import fingerprint
from wlora.errors import ConfigError, RunFault
from wlora.experiment.export import find_record
from wlora.experiment.resolve import check_results_folder, identify_adapter
from wlora.models.source import locate
from wlora.storage.atomic_write import check_folders
from wlora.storage.environment import compare_environments
from wlora.storage.records import Record, RecordStore

ALLOWED = tuple(name for name, part in walk() if part.metadata["decides"] == "nothing")
"""The keys that decide nothing."""

_SHOWN = 20
# Of a record, what a repetition on the same machine gives again.
_COMPARED = ("metrics", "adapters", "events", "parameters", "steps")
_INPUTS = ("task", "model")


def prepare(words: Sequence[str]) -> tuple[Record, Config]:
    """Return the record to repeat and the configuration to do so.

    Overrides may move files and change what decides no number; the precision is the one that the record's run chose.

    Raises:
        ConfigError: no such record, an override of what decides the numbers, files of other content.
    """
    origins = [word.removeprefix("from=") for word in words if word.startswith("from=")]
    overrides = [word for word in words if not word.startswith("from=")]
    if len(origins) != 1 or not all(re.fullmatch(r"[\w.]+=.*", word) for word in overrides):
        raise ConfigError("from=RUN_ID repeats one run: allowed beside it is key=value, such as results_dir=DIR")
    for word in overrides:
        if word.partition("=")[0] not in ALLOWED:
            raise ConfigError(
                f"{word}: from={origins[0]} repeats the run as it was: allowed beside it is {', '.join(ALLOWED)}"
            )
    results_dir = next((word.partition("=")[2] for word in overrides if word.startswith("results_dir=")), "results")
    record = find_record(results_dir, origins[0])
    RecordStore(results_dir).read_curve(record)  # a damaged one is told before the run
    if "${" in json.dumps(record.config):
        # A run's configuration is resolved. Here it would be so again, with what this machine holds (`${oc.env:...}`).
        raise ConfigError(f"from={origins[0]}: its record has an interpolation, ${{...}}, which no run has written")
    # How the record's run was asked for is no wish of this one.
    recorded = dataclasses.replace(restore_config(record.config), force=False, offline=False, track="none")
    merged = OmegaConf.merge(OmegaConf.structured(recorded), OmegaConf.from_dotlist(overrides))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check_rules(config, rewritten=ALLOWED)
    _refuse_other_numerics(record, config)
    config.precision = record.environment.get("precision", config.precision)
    config.results_dir = str(Path(results_dir) / "reruns")
    check_folders(results_dir, "reruns")
    check_results_folder(config.results_dir)
    identify_adapter(config.adapter)
    _refuse_other_content(record, recorded, config)
    if config.model.source == "hub" and config.model.path is None:
        config.model.revision = record.model.get("revision") or config.model.revision
    if config.task.hub_id and config.task.path is None:
        config.task.revision = record.task.get("version") or config.task.revision
    return record, config


def _refuse_other_numerics(record: Record, config: Config) -> None:
    """Refuse a record of a policy whose keys have come to mean other numbers since."""
    then = config.method.get("revision", 1)
    now = method_revision(config.method, release=config.compat == "release")
    if then != now:
        raise ConfigError(
            f"from={record.run_id}: method={config.method['name']} gives other numbers now (revision {now}, not {then}): "
            f"allowed is a record of revision {now}, or the commit {record.environment.get('git_commit')} that made this one"
        )


def _refuse_other_content(record: Record, recorded: Config, config: Config) -> None:
    """Refuse local or generated data and weights that are not those of the record."""
    local_task = recorded.task.path is not None or recorded.task.generator is not None
    told = {"task": record.task.get("data") if local_task else None, "model": record.model.get("fingerprint")}
    found = {"task": fingerprint(config.task), "model": locate(config.model).fingerprint}
    for name in _INPUTS:
        if told[name] not in (None, found[name]):
            where = getattr(config, name).path
            raise ConfigError(
                f"{name}.path={where}: its content is {found[name]}, that of from={record.run_id} was {told[name]}"
            )


def compare(before: Record, now: Record, results_dir: str | Path) -> tuple[bool, str]:
    """Compare a repetition with its record; returns whether all numbers are equal, bit for bit, and what to tell."""
    folders = (Path(results_dir), Path(results_dir) / "reruns")
    curves = [RecordStore(folder).read_curve(run) for folder, run in zip(folders, (before, now), strict=True)]
    pairs = {key: (getattr(before, key), getattr(now, key)) for key in _COMPARED}
    counted = {key: (len(old), len(new)) for key, (old, new) in pairs.items()}
    numbers = [line for key, (old, new) in pairs.items() for line in _differences(key, old, new)]
    numbers += _differences("curve", *curves) if curves[0] else []
    trained = [record.model.get("adapter") for record in (before, now)]
    numbers += _differences("trained adapters", *trained) if all(trained) else []
    inputs = [line for key in _INPUTS for line in _differences(key, *(_input(record, key) for record in (before, now)))]
    changed = compare_environments(before.environment, now.environment)
    versions = [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]
    sizes = ", ".join(f"{counted[key][0]} {key}" for key in ("metrics", "adapters", "events"))
    lines = [f"equal      {sizes}, {len(curves[0])} points of the learning curve, bit for bit"]
    if numbers:
        lines = [f"different  {len(numbers)} numbers:", *_indent(numbers)]
    lines += ["inputs     differ:", *_indent(inputs)] if inputs else []
    lines += ["versions   differ:", *_indent(versions)] if versions else ["versions   and settings are the same"]
    return not numbers, "\n".join(lines)


def repeat(words: Sequence[str]) -> bool:
    """Repeat a run, say what is different, and return whether all numbers are equal.

    Raises:
        ConfigError: it cannot be repeated here.
        RunFault: the repetition failed, or another process is at it.
    """
    from wlora.experiment.requirements import require_all

    before, config = prepare(words)
    require_all(config)
    if config.dry_run:
        from wlora.experiment.dry_run import describe

        print(describe(config))
        return True
    from wlora.console import say
    from wlora.experiment.run import run

    now = run(config, words)
    if now.status != "success":
        raise RunFault(f"from={before.run_id}: the repetition is {now.status}, so nothing is compared")
    equal, text = compare(before, now, Path(config.results_dir).parent)
    say(f"from       {before.run_id}, commit {before.environment.get('git_commit')}\n{text}")
    return equal


def _input(record: Record, key: str) -> dict[str, Any]:
    """Return what is noted of data or model; the trained adapters are no input."""
    return {name: value for name, value in getattr(record, key).items() if name not in RECORDED.values()}


def _differences(key: str, old: Any, new: Any) -> list[str]:
    """Return a line per value that differs between two nested ones; keys of one side only are none of a number."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for name in old.keys() & new.keys() for line in _differences(f"{key}.{name}", old[name], new[name])]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for at, pair in enumerate(zip(old, new, strict=True)) for line in _differences(f"{key}[{at}]", *pair)]
    if old == new:
        return []
    change = f" ({new - old:+.3g})" if isinstance(old, float) and isinstance(new, float) else ""
    return [f"{key}: {_brief(old)} -> {_brief(new)}{change}"]


def _brief(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list | dict) else str(value)


def _indent(lines: list[str]) -> list[str]:
    left = [f"           … and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [*(f"           {line}" for line in sorted(lines)[:_SHOWN]), *left]
