"""`python -m wlora.run from=RUN_ID`: repeat a recorded run and report which numbers differ.

The repetition is stored in `<results_dir>/reruns`, a separate study. The original record stays unchanged, and no table
counts the same run twice.
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
from wlora.config.spelling import expand_home, quote_texts
from wlora.console import put
from wlora.data.sources import fingerprint
from wlora.distributed import is_main
from wlora.errors import ConfigError, RunFault
from wlora.experiment.export import find_record
from wlora.experiment.resolve import check_results_folder, identify_adapter
from wlora.models.source import locate
from wlora.storage.atomic_write import check_folders
from wlora.storage.environment import compare_environments
from wlora.storage.records import Record, RecordStore

ALLOWED = tuple(name for name, part in walk() if part.metadata["decides"] == "nothing")
"""Keys that do not influence the results and may therefore be changed for a repetition."""

_SHOWN = 20
# Fields of a record that a repetition on the same machine must reproduce.
_COMPARED = ("metrics", "adapters", "events", "parameters", "steps")
_INPUTS = ("task", "model")


def prepare(words: Sequence[str]) -> tuple[Record, Config]:
    """Return the record to repeat and the configuration for the repetition.

    Overrides may only change keys in `ALLOWED`, such as paths. The precision is the one that the recorded run used.

    Raises:
        ConfigError: there is no such record, an override would change results, or local files have other content.
    """
    origins = [word.removeprefix("from=") for word in words if word.startswith("from=")]
    overrides = [word for word in words if not word.startswith("from=")]
    if len(origins) != 1 or not all(re.fullmatch(r"[\w.]+=.*", word) for word in overrides):
        raise ConfigError("from=RUN_ID repeats one run: allowed with it is key=value, such as results_dir=DIR")
    for word in overrides:
        if word.partition("=")[0] not in ALLOWED:
            raise ConfigError(
                f"{word}: from={origins[0]} repeats the run unchanged: allowed with it is {', '.join(ALLOWED)}"
            )
    results_dir = next((word.partition("=")[2] for word in overrides if word.startswith("results_dir=")), "results")
    results_dir = expand_home("results_dir", results_dir)
    record = find_record(results_dir, origins[0])
    RecordStore(results_dir).read_curve(record)  # report a damaged learning curve before the run starts
    if "${" in json.dumps(record.config):
        # Records contain resolved values only. An interpolation such as `${oc.env:...}` would read data of this machine.
        raise ConfigError(f"from={origins[0]}: its record contains an interpolation, ${{...}}, which wlora never writes")
    # These keys describe how the recorded run was started; they must not affect the repetition.
    recorded = dataclasses.replace(restore_config(record.config), force=False, offline=False, track="none")
    # The values are YAML, apart from texts that need quotes on the command line of a run.
    texts = [word for word, quoted in zip(overrides, quote_texts(overrides), strict=True) if word != quoted]
    given = OmegaConf.from_dotlist([word for word in overrides if word not in texts])
    merged = OmegaConf.merge(OmegaConf.structured(recorded), given)
    for word in texts:
        key, _, value = word.partition("=")
        OmegaConf.update(merged, key, value)
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
    """Reject a record if its method now computes different numbers (`method_revision`)."""
    then = config.method.get("revision", 1)
    now = method_revision(config.method, release=config.compat == "release")
    if then != now:
        raise ConfigError(
            f"from={record.run_id}: method={config.method['name']} now computes different numbers (revision {now}, not "
            f"{then}): allowed is a record of revision {now}, or its commit {record.environment.get('git_commit')}"
        )


def _refuse_other_content(record: Record, recorded: Config, config: Config) -> None:
    """Reject local or generated data, or weights, whose content differs from the record."""
    local_task = recorded.task.path is not None or recorded.task.generator is not None
    told = {"task": record.task.get("data") if local_task else None, "model": record.model.get("fingerprint")}
    found = {"task": fingerprint(config.task), "model": locate(config.model).fingerprint}
    for name in _INPUTS:
        if told[name] not in (None, found[name]):
            where = getattr(config, name).path
            raise ConfigError(
                f"{name}.path={where}: its content is {found[name]}; in from={record.run_id} it was {told[name]}"
            )


def compare(before: Record, now: Record, results_dir: str | Path) -> tuple[bool, str]:
    """Compare a repetition with its record; return whether all numbers are bitwise equal, and a report for the user."""
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
    """Repeat a run, print the differences, and return whether all numbers are equal.

    Raises:
        ConfigError: the run cannot be repeated with this code or on this machine.
        RunFault: the repetition failed, or another process is executing it.
    """
    from wlora.experiment.requirements import require_all

    before, config = prepare(words)
    require_all(config)
    if config.dry_run:
        from wlora.experiment.dry_run import describe

        text = describe(config)  # in every process, because one that fails must fail in all
        if is_main():
            put(text)
        return True
    from wlora.console import say
    from wlora.experiment.run import run

    now = run(config, words, keyed=bool(before.packed))
    if now.status != "success":
        raise RunFault(f"from={before.run_id}: the repetition is {now.status}, so nothing is compared")
    equal, text = compare(before, now, Path(config.results_dir).parent)
    say(f"from       {before.run_id}, commit {before.environment.get('git_commit')}\n{text}")
    return equal


def _input(record: Record, key: str) -> dict[str, Any]:
    """Return the recorded facts about data or model, without the trained adapters, which are an output."""
    return {name: value for name, value in getattr(record, key).items() if name not in RECORDED.values()}


def _differences(key: str, old: Any, new: Any) -> list[str]:
    """Return one line per differing value of two nested structures. Keys that exist on only one side are ignored."""
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
