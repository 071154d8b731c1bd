"""Export of the trained adapters of a run.

The format `peft` is a folder for `PeftModel.from_pretrained(base, folder)` and for `adapter.path`. The format `merged` is a
plain transformers model, also for `model.path`. Both contain a model card with data from the record.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wlora.adapters.peft_format import CONFIG, RECORDED, make_uniform, refuse_unbounded
from wlora.analysis.study import read_words
from wlora.analysis.study_reader import read_run
from wlora.config.schema import Config, restore_config
from wlora.config.spelling import expand_home
from wlora.data.hub import go_offline, require_sources
from wlora.errors import ConfigError, shorten, unknown_name, wrong_value
from wlora.experiment.model_card import write_card
from wlora.models.architectures import read_architecture
from wlora.models.source import ModelSource, locate, require_extras
from wlora.storage.atomic_write import MISSING, check_folders, patiently
from wlora.storage.content_hash import hash_bytes
from wlora.storage.records import Record, RecordStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMATS = ("peft", "merged")
OPTIONS = {
    "format": "peft",
    "results_dir": "results",
    "to": None,
    "model.path": None,
    "offline": "false",
    "compact": "false",
}
_PATHS = ("results_dir", "to", "task.path", "model.path")
_SWITCH = ("true", "false")


def export(words: Sequence[str]) -> Path:
    """Export a run as requested by the arguments; return the folder.

    Raises:
        ConfigError: the run does not exist or has no adapters, or the base is not the one of the run.
        RunFault: the folder cannot be written.
    """
    names, options = read_options(words, OPTIONS)
    if len(names) != 1:
        raise ConfigError(f"{' '.join(names) or 'RUN_ID is missing'}: allowed is one RUN_ID, the name of a record")
    kind, results = options["format"], str(options["results_dir"])
    if kind not in FORMATS:
        raise wrong_value("format", kind, " | ".join(FORMATS))
    if kind == "merged" and options["compact"] == "true":
        raise wrong_value("compact", "true", "false with format=merged")
    record = find_record(results, names[0])
    adapters = trained_adapters(results, record)
    target = Path(options["to"] or Path(results) / "exports" / f"{record.run_id}-{kind}")
    if options["to"] and os.path.lexists(target):
        raise wrong_value("to", target, "a folder that does not exist yet")
    config = restore_config(record.config)
    config.model.path, config.offline = options["model.path"] or config.model.path, options["offline"] == "true"
    if kind == "merged":
        _refuse_packed(config)
        _refuse_unknown_scale(record, results)
        source = require_base(config, record)
    from wlora.experiment.saving import replacing, write_model

    if not options["to"]:
        check_folders(results, "exports")
    with replacing(target) as staging:
        if kind == "peft":
            staging.mkdir(parents=True)
            write_files(adapters, staging)
            if options["compact"] == "false":
                make_uniform(staging)
            _add_tokenizer(config, record, staging)
        else:
            write_model(*merge(config, source, adapters), staging)
        write_card(staging / "README.md", record, config, merged=kind == "merged")
    return target


def read_options(words: Sequence[str], defaults: Mapping[str, str | None]) -> tuple[list[str], dict[str, str | None]]:
    """Split the arguments of a command into names and options. Missing options have their defaults.

    `~` at the start of paths is replaced by the home folder, and switches are in lower case.

    Raises:
        ConfigError: an option is unknown or has no value, or a switch is neither true nor false.
    """
    names, options, strange = read_words(words, dict(defaults))
    for key in strange:
        raise unknown_name(key, key, defaults)
    for key, value in options.items():
        if value is not None and key in _PATHS:
            options[key] = expand_home(key, value)
        elif value is not None and defaults[key] in _SWITCH:
            options[key] = value.lower()
            if options[key] not in _SWITCH:
                raise wrong_value(key, value, " | ".join(_SWITCH))
    return names, options


def find_record(results_dir: str, run_id: str) -> Record:
    """Return the record of a successful run.

    Raises:
        ConfigError: there is no such record, the run did not succeed, or the record is damaged.
    """
    if not os.path.isdir(results_dir):
        raise wrong_value("results_dir", results_dir, "a folder with the records of a study")
    store = RecordStore(results_dir)
    record = store.load(run_id) if re.fullmatch(r"[\w-]{1,100}", run_id) else None
    if record is None:
        known = [file.stem for file in store.folder.glob("*.json")]
        near = difflib.get_close_matches(run_id, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{shorten(run_id)}: no record of that name among the {len(known)} in {store.folder}{hint}")
    if record.status != "success":
        raise ConfigError(f"{run_id}: its status is {record.status}: allowed is a run that has succeeded")
    try:
        read_run(record)
    except ValueError as error:
        raise ConfigError(f"record {store.path(run_id)} is damaged: {error}") from None
    return record


def trained_adapters(results_dir: str, record: Record) -> dict[str, bytes]:
    """Return the content of a run's adapter files by name, checked against the hashes in the record.

    The checked bytes are returned instead of paths, because the files could change after the check.

    Raises:
        ConfigError: the run has saved no adapters, or the files differ from those that it wrote.
    """
    folder = Path(results_dir) / "adapters" / record.run_id
    if not record.adapters:
        raise ConfigError(
            f"{record.run_id}: method={record.config['method']['name']} has saved no adapters\n"
            "way out: repeat the run with train.save_model=true, which saves the whole model"
        )
    try:
        files = {name: patiently((folder / name).read_bytes) for name in RECORDED}
    except MISSING:
        raise ConfigError(f"{record.run_id}: its adapters are not in {folder}\n{_run_again(record, results_dir)}") from None
    except OSError as error:
        raise ConfigError(f"{record.run_id}: its adapters in {folder} cannot be read ({error.strerror})") from None
    for name, key in RECORDED.items():
        found, written = hash_bytes(files[name]), record.model.get(key)
        if written != found and not (name == CONFIG and written is None):
            raise ConfigError(f"{folder}: {name} is not what the run wrote ({found}, the record says {written})")
    refuse_unbounded(files[CONFIG], str(folder))
    return files


def _run_again(record: Record, results_dir: str) -> str:
    return f"way out: python -m wlora.run from={record.run_id} results_dir={results_dir} runs it again and keeps them"


def _refuse_unknown_scale(record: Record, results_dir: str) -> None:
    """Reject merging if the record has no hash of the adapter configuration, which contains rank and alpha.

    Older records contain only a hash of the weights.
    """
    if record.model.get(RECORDED[CONFIG]) is None:
        raise ConfigError(
            f"format=merged: the record of {record.run_id} is from before {CONFIG} was hashed: allowed is format=peft\n"
            f"{_run_again(record, results_dir)}"
        )


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files by name into a folder."""
    for name, content in files.items():
        (folder / name).write_bytes(content)


def merge(
    config: Config, source: ModelSource, adapters: Mapping[str, bytes]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base of a run in float32, merge its adapters, and set its trained head and label names.

    Raises:
        ConfigError: the adapters cannot be loaded or merged.
    """
    from wlora.adapters.peft_format import fold_peft

    base, tokenizer = load_trained(config, source, adapters)
    try:
        fold_peft(base)
    except ValueError as error:
        raise ConfigError(f"the adapters cannot be merged ({type(error).__name__}: {shorten(error)})") from error
    return base, tokenizer


def load_trained(
    config: Config, source: ModelSource, adapters: Mapping[str, bytes]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base of a run in float32 with its adapters as modules of PEFT, its trained head and its label names.

    Raises:
        ConfigError: base or adapters cannot be loaded.
    """
    from peft import PeftModel

    from wlora.models.heads import name_classes
    from wlora.models.loading import load_model, quiet
    from wlora.models.tokenizer import load_tokenizer
    from wlora.tasks.base import build_task
    from wlora.tasks.summarization import Summarization

    task = build_task(config.task)
    tokenizer = load_tokenizer(config.model, source)
    base = load_model(config.model, source, tokenizer, head=task.head, num_labels=task.num_labels, seed=0)
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            write_files(adapters, Path(folder))
            PeftModel.from_pretrained(base, folder)  # it changes the base in place
    except Exception as error:  # PEFT, safetensors and torch raise many kinds of exceptions for invalid files
        raise ConfigError(f"the adapters cannot be merged ({type(error).__name__}: {shorten(error)})") from error
    name_classes(base, config.task.labels, head=task.head, several=config.task.kind == "multi_label")
    if isinstance(task, Summarization):
        task.set_generation(base)
    return base, tokenizer


def _add_tokenizer(config: Config, record: Record, folder: Path) -> None:
    """Add the base's tokenizer, and its configuration with the names of the classes, to exported adapters.

    If the base is not available, only a notice is printed.
    """
    from types import SimpleNamespace

    from wlora.models.heads import make_config, name_classes
    from wlora.models.loading import quiet
    from wlora.models.tokenizer import load_tokenizer
    from wlora.tasks.base import build_task

    task = build_task(config.task)
    try:
        tokenizer = load_tokenizer(config.model, require_base(config, record))
        described = make_config(read_architecture(config.model), num_labels=task.num_labels)
    except ConfigError as error:
        print(f"notice: the tokenizer is not exported: {error}", file=sys.stderr)
        return
    name_classes(
        SimpleNamespace(config=described), config.task.labels, head=task.head, several=config.task.kind == "multi_label"
    )  # type: ignore[arg-type]
    with quiet():
        tokenizer.save_pretrained(folder)
        described.save_pretrained(folder)


def _refuse_packed(config: Config) -> None:
    """Reject quantised bases, into which adapters cannot be merged."""
    if config.model.quantization != "none" or config.model.gguf_file:
        raise ConfigError("format=merged: adapters are not merged into weights from quantised ones: allowed is format=peft")


def require_base(config: Config, record: Record) -> ModelSource:
    """Return the base on which the run's adapters were trained; ConfigError if it is unavailable or has other content."""
    model = config.model
    if config.offline:
        go_offline()
    require_extras(model)
    model.revision = record.model.get("revision") or model.revision
    # The data of the task are not needed.
    require_sources(dataclasses.replace(config, task=dataclasses.replace(config.task, hub_id=None)))
    source, trained_on = locate(model), record.model.get("fingerprint")
    if trained_on is not None and source.fingerprint != trained_on:
        raise ConfigError(f"model.path={model.path}: its content is {source.fingerprint}, the run's base was {trained_on}")
    return source
