"""Entry point: `python -m wlora.run task=rte method=wlora_plus rank=4`, and Hydra multirun with `-m`.

Help, the composed configuration, mistakes in it and a missing network are answered before torch is imported.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wlora.config import METHOD_NOTES, Config, config_folder, register_schema
from wlora.errors import ConfigError, RunFault, unknown_name, wrong_value
from wlora.help import register_help, show_values
from wlora.presets import apply_preset
from wlora.processes import is_main, several


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended."""

    name: str
    status: str
    score: float | None
    exit_code: int


def main() -> None:
    """Compose the configuration, run it (or each run of a sweep) and exit with 0, 1 (fault) or 2 (mistake)."""
    # With this set Hydra hands its errors to us instead of printing them with a traceback.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    register_schema()
    register_help()
    outcomes: list[Outcome] = []

    def run_one(composed: DictConfig) -> float | None:
        # Unresolved: the words may hold interpolations, which mean nothing in Hydra's own configuration.
        words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        overrides = [str(word) for word in words]
        name = _name(composed)
        outcome = _attempt(name, lambda: _run_composed(name, composed, overrides))
        outcomes.append(outcome)
        return outcome.score

    try:
        if any(word.startswith("from=") for word in sys.argv[1:]):
            outcomes.append(_attempt("", lambda: _repeat(sys.argv[1:])))
        else:
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(run_one)()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(ConfigError(explain(error)))
        sys.exit(2)
    except KeyboardInterrupt as stop:
        _fail(RunFault(f"interrupted: {stop}" if str(stop) else "interrupted"))
        sys.exit(getattr(stop, "exit_code", 130))
    except BrokenPipeError:
        # The reader has seen enough (`--help | head`); keep Python from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _fail(ConfigError(f"results_dir: {error.filename} cannot be written ({error.strerror})"))
        sys.exit(2)
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        # What a run raises does not come as far as here: this is Hydra at a value that it does not foresee.
        _fail(ConfigError(f"the command line cannot be composed ({type(error).__name__}: {explain(error)})"))
        sys.exit(2)
    if len(outcomes) > 1 and is_main():
        _print_sweep(outcomes)
    sys.exit(max((outcome.exit_code for outcome in outcomes), default=0))


def _name(composed: DictConfig) -> str:
    """Name a run for the summary of a sweep; what is missing in a wrong configuration is a question mark."""
    try:
        task, method, model = (OmegaConf.select(composed, f"{group}.name") or "?" for group in ("task", "method", "model"))
        return f"{task} {method} {model} seed={composed.seed}"
    except OmegaConfBaseException:
        return "?"


def _attempt(name: str, act: Callable[[], Outcome]) -> Outcome:
    """Run what `act` does; a failure is told in a line or two and does not stop a sweep.

    It does where it may be that of one process out of several, for which the others wait: their launcher ends them.
    """
    try:
        return act()
    except ConfigError as error:
        _fail(error)
        return Outcome(name, type(error).__name__, None, error.exit_code)
    except RunFault as error:
        _fail(error)
        if several() and not error.everywhere:
            sys.exit(error.exit_code)
        return Outcome(name, type(error).__name__, None, error.exit_code)
    except OmegaConfBaseException as error:
        _fail(ConfigError(explain(error)))
        return Outcome(name, "ConfigError", None, 2)
    except Exception:
        # A bug, not a mistake of the user: the record says `failed`, the traceback goes to whoever mends it.
        import traceback

        traceback.print_exc()
        if several():
            sys.exit(RunFault.exit_code)
        return Outcome(name, "failed", None, 1)


def _run_composed(name: str, composed: DictConfig, overrides: list[str]) -> Outcome:
    """Run one composed configuration.

    `overrides` are the words of the command line, or of this run of a sweep: a preset leaves their keys alone.
    """
    from wlora.models.source import locate
    from wlora.study import fill_tuned
    from wlora.tasks.data import fingerprint
    from wlora.validation import resolve

    _refuse_foreign_task(composed)
    preset = apply_preset(composed, overrides)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    _refuse_added_keys(composed)
    if preset and is_main():
        print(f"preset: {show_values(preset)}", flush=True)
    resolve(config)
    require_all(config)
    source, data = locate(config.model), fingerprint(config.task)
    choice = fill_tuned(config, task_data=data, model_data=source.fingerprint)
    if choice is not None and is_main():
        where = config.tune_on or config.task.name
        print(f"tuned: lr={config.lr:g} warmup={config.warmup}, best of {choice.compared} on {where} seed={choice.seed}")

    if config.dry_run:
        from wlora.dry_run import describe

        print(describe(config))
        return Outcome(name, "described", None, 0)
    from wlora.experiment import run

    record = run(config, overrides)
    return Outcome(name, record.status, record.metrics.get(record.primary_metric), 0)


def _repeat(words: list[str]) -> Outcome:
    """Repeat a recorded run (`from=RUN_ID`); a number that differs counts as a fault."""
    from wlora.rerun import repeat

    return Outcome("", "compared", None, 0 if repeat(words) else RunFault.exit_code)


def require_all(config: Config) -> None:
    """Refuse a run for which something is not installed, or neither at hand nor reachable; a dry run needs nothing.

    Raises:
        ConfigError: what is missing, and the way out.
    """
    from wlora.hub import go_offline, require_sources
    from wlora.models.source import require_extras
    from wlora.tracking import require_tracker

    if config.offline:
        go_offline()
    if not config.dry_run:
        require_extras(config.model)
        require_tracker(config.track)
        require_sources(config)


def _refuse_foreign_task(composed: DictConfig) -> None:
    """Refuse a task for which an experiment, whose figures differ by task, has none."""
    name = composed.task.name
    if composed.per_task and name not in composed.per_task:
        raise wrong_value("task", name, f"{', '.join(composed.per_task)} in this experiment")


def _refuse_added_keys(composed: DictConfig) -> None:
    """Refuse what Hydra's `+key=value` added beside the schema: nothing would read it."""
    schema = OmegaConf.structured(Config)
    for parent in ("", "task", "task.generation", "model", "train", "adapter"):
        allowed = list(_node(schema, parent).keys())  # keys(): a missing value is still a key
        for name in _node(composed, parent):
            if name not in allowed:
                key = f"{parent}.{name!s}".lstrip(".")
                raise unknown_name(key, key, _sibling_keys(key))


def _node(config: DictConfig, parent: str) -> DictConfig:
    node: DictConfig = OmegaConf.select(config, parent) if parent else config
    return node


def explain(error: Exception) -> str:
    """Bring an error of Hydra or OmegaConf to one or two lines: the key, the value, what is allowed."""
    text = f"{error}\n{error.__cause__ or ''}"
    missing = re.search(r"Could not find '([\w-]+)/([^']+)'", text)
    if missing:
        group, name = missing.groups()
        return str(unknown_name(f"{group}={name}", name, _group_options(group), say=lambda near: f"{group}={near}"))
    key = re.search(r"full_key: (\S+)", text)
    value = re.search(r"Value '([^']*)'|Cannot convert '([^']*)'", text)
    if key and value:
        return f"{key[1]}={value[1] or value[2]}: allowed is {_expected(key[1], text)}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return str(unknown_name(unknown[1], unknown[1], _sibling_keys(unknown[1])))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def _expected(key: str, text: str) -> str:
    """Say what a key takes: its rule where it has one, else the type that OmegaConf asked for."""
    from wlora.validation import RULES

    if key in RULES:
        return RULES[key]
    match = re.search(r"could not be converted to (\w+)|to supported type '([^']+)'|is not a valid (\w+)", text)
    return next(filter(None, match.groups())).lower() if match else "a value of another type"


def _group_options(group: str) -> list[str]:
    return [file.stem for file in (config_folder() / group).glob("*.yaml")]


def _sibling_keys(key: str) -> list[str]:
    """List the keys beside a mistyped one, in the schema or (for a method) in the YAML files."""
    parent, _, _ = key.rpartition(".")
    if parent == "method":
        found: set[str] = set()
        chosen = [word.partition("=")[2] for word in sys.argv if word.startswith("method=")]
        for file in (config_folder() / "method").glob(f"{chosen[-1] if chosen else '*'}.yaml"):
            content: Any = OmegaConf.to_container(OmegaConf.load(file))
            found |= {f"method.{name}" for name in content.get("method", content)}
        found -= {key, *(f"method.{note}" for note in METHOD_NOTES)}
        return sorted(found | {"method.preset"})
    schema = OmegaConf.structured(Config)
    node = OmegaConf.select(schema, parent) if parent else schema
    names = list(node) if isinstance(node, DictConfig) else list(schema)
    return [f"{parent}.{name}" if parent and isinstance(node, DictConfig) else str(name) for name in names]


def _fail(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def _print_sweep(outcomes: list[Outcome]) -> None:
    """End a sweep with a line per run."""
    width = max(len(outcome.name) for outcome in outcomes)
    print("\nsweep:")
    for outcome in outcomes:
        score = "" if outcome.score is None else f"{outcome.score:.4f}"
        print(f"  {outcome.name:<{width}}  {outcome.status:<11} {score}")


if __name__ == "__main__":
    main()
