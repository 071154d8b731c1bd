"""Prediction of new rows with the trained adapters of a run, as a table or as the files of the GLUE server."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wlora.config.schema import Config, restore_config
from wlora.console import tell
from wlora.data import local_files as files
from wlora.data.row_checks import check_inputs
from wlora.data.sources import load_inputs, wrap
from wlora.errors import ConfigError, wrong_value
from wlora.experiment.export import find_record, load_trained, read_options, require_base, trained_adapters
from wlora.experiment.glue_files import find_server_files, write_server_file
from wlora.experiment.saving import model_folder
from wlora.models.source import locate
from wlora.storage.atomic_write import put
from wlora.storage.records import Record

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from wlora.tasks.base import Task

OPTIONS = {"results_dir": "results", "to": None, "split": None, "task.path": None, "model.path": None, "offline": "false"}


class Trained(NamedTuple):
    """A trained model with everything that its predictions need."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    config: Config


def predict(words: Sequence[str]) -> list[Path]:
    """Predict rows as requested by the arguments; return the written files.

    Raises:
        ConfigError: the run does not exist or has saved neither adapters nor model, or the rows cannot be read.
    """
    names, options = read_options(words, OPTIONS)
    split, to = options["split"], options["to"]
    if not names or len(names) > 2 or (len(names) == 2) == (split is not None):
        raise ConfigError(
            f"{' '.join(names) or 'RUN_ID is missing'}: allowed is RUN_ID FILE to=OUT.csv, or RUN_ID split=NAME"
        )
    results = str(options["results_dir"])
    record = find_record(results, names[0])
    config = restore_config(record.config)
    config.task.path = options["task.path"] or config.task.path
    if config.task.path is None:
        config.task.revision = record.task.get("version") or config.task.revision
    config.model.path, config.offline = options["model.path"] or config.model.path, options["offline"] == "true"
    if split == "test" and config.task.benchmark == "glue":
        return _predict_glue(config, record, results, Path(to or Path(results) / "glue"))
    target = _check_target(to, names[1] if len(names) == 2 else None)
    table, where = _read_rows(config, names[1] if len(names) == 2 else None, split)
    inputs = check_inputs(table, config.task, where)  # before the model is loaded
    answers = _label(load(config, record, results), inputs)
    kept = [name for name in table.column_names if name not in answers.column_names]
    whole = table.select(kept)
    for name in answers.column_names:
        whole = whole.append_column(name, answers.column(name))
    _write(whole, target)
    return [target]


def load(config: Config, record: Record, results: str) -> Trained:
    """Load the model of a run with its trained adapters, or the whole model that the run has saved.

    Raises:
        ConfigError: the run has saved neither, the base is not available, or files differ from those of the run.
    """
    from wlora.tasks.base import build_task

    folder = model_folder(results, record.run_id)
    if record.adapters and (config.train.save_adapter or not folder.is_dir()):
        if not config.train.save_adapter:
            raise ConfigError(
                f"{record.run_id}: trained with train.save_adapter=false, so no trained weights were saved\n"
                "way out: repeat the run with train.save_adapter=true force=true"
            )
        adapters = trained_adapters(results, record)
        model, tokenizer = load_trained(config, require_base(config, record), adapters)
        return Trained(model, tokenizer, build_task(config.task), config)
    if not folder.is_dir():
        trained_adapters(results, record)  # raises an error that says what is missing
    from wlora.models.heads import name_classes
    from wlora.models.loading import load_model
    from wlora.models.tokenizer import load_tokenizer

    whole = dataclasses.replace(
        config.model, path=str(folder), head="kept", sha256=None, quantization="none", gguf_file=None
    )
    task, source = build_task(config.task), locate(whole)
    if task.head == "seq2seq":
        whole.head = "fresh"  # the stored value is not applicable: such a model has no separate head
    tokenizer = load_tokenizer(whole, source)
    model = load_model(whole, source, tokenizer, head=task.head, num_labels=task.num_labels, seed=0)
    name_classes(model, config.task.labels, head=task.head, several=config.task.kind == "multi_label")
    return Trained(model, tokenizer, task, config)


def _check_target(to: str | None, file: str | None) -> Path:
    if to is None:
        raise ConfigError("to is missing: add to=OUT.csv, the file for the predictions")
    target = Path(to).expanduser()
    if files.extension(target) not in files.EXTENSIONS or target.is_dir():
        raise wrong_value("to", to, f"a file of type {', '.join(files.EXTENSIONS)}")
    if file is not None and target.resolve() == Path(file).expanduser().resolve():
        raise wrong_value("to", to, "a file other than the input file")
    return target


def _read_rows(config: Config, file: str | None, split: str | None) -> tuple[pa.Table, str]:
    """Return the rows to predict with all their columns, and a description of them for messages."""
    if file is None:
        assert split is not None
        return load_inputs(config.task, split, offline=config.offline), f"split={split}"
    place = Path(file).expanduser()
    if not os.path.isfile(place):
        raise ConfigError(f"{file}: the file does not exist")
    if files.extension(place) not in files.EXTENSIONS:
        raise ConfigError(f"{file}: a file of type {place.suffix or 'none'}; allowed is {', '.join(files.EXTENSIONS)}")
    if place.stat().st_size == 0:
        raise ConfigError(f"{file}: the file is empty; expected are rows")
    return files.read_table(place, None, file), file


def _predict_glue(config: Config, record: Record, results: str, folder: Path) -> list[Path]:
    """Write the files for the GLUE server for the task of a run."""
    found: list[tuple[str, pa.Table]] = []
    for name, task, split in find_server_files(config.task):
        try:
            table = load_inputs(task, split, offline=config.offline)
        except ConfigError as error:
            if name != "AX":
                raise
            tell(f"notice: {name}.tsv is not written: {str(error).splitlines()[0]}")
            continue
        found.append((name, check_inputs(table, task, f"{name}: {split}")))
    trained = load(config, record, results)
    written = []
    for name, inputs in found:
        answers = _label(trained, inputs).column("prediction").to_pylist()
        written.append(write_server_file(folder / f"{name}.tsv", name, answers, config.task.labels))
    return written


def _label(trained: Trained, inputs: pa.Table) -> pa.Table:
    """Return the predictions of checked rows, one line per row (see `Task.answer`)."""
    from accelerate import Accelerator

    from wlora.training.evaluation import predict as predict_rows
    from wlora.training.precision import has_accelerator

    accelerator = Accelerator(cpu=not has_accelerator())
    rows = wrap(inputs, f"predict/{inputs.num_rows}/{id(inputs)}")
    features = trained.task.encode(rows, trained.tokenizer, training=False)
    if features.truncated_share:
        tell(f"notice: {features.truncated_share:.1%} of the rows are truncated to {trained.config.task.max_length} tokens")
    model = trained.model.to(accelerator.device)
    found = predict_rows(
        model,
        trained.task,
        features,
        trained.tokenizer,
        batch_size=trained.config.task.eval_batch_size,
        accelerator=accelerator,
    )
    return trained.task.answer(found, features, rows)


def _write(table: pa.Table, target: Path) -> None:
    """Write a table atomically."""
    staging = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_table(table, staging)
        put(staging, target)
    except OSError as error:
        raise ConfigError(f"to={target}: cannot be written ({error.strerror or error})") from error
    finally:
        staging.unlink(missing_ok=True)
