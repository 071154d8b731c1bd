"""Description of a run without executing it (`dry_run=true`). It needs neither weights nor network."""

from __future__ import annotations

import dataclasses
from typing import Any

from accelerate import Accelerator

from wlora.config.schema import Config
from wlora.data.held_out import count_folds
from wlora.data.sources import count_train_rows, load_splits
from wlora.errors import ConfigError
from wlora.experiment.build import assemble, prepare_method
from wlora.experiment.memory_estimate import estimate, tell
from wlora.experiment.run import open_record
from wlora.experiment.summary import share_of_model
from wlora.methods.base import Method, Steps
from wlora.models.architectures import read_architecture
from wlora.models.loading import build_unloaded
from wlora.models.source import ModelSource, locate
from wlora.models.tokenizer import load_tokenizer
from wlora.storage.records import RecordStore
from wlora.tasks.base import build_task
from wlora.training.batch_growth import settle_growth
from wlora.training.precision import Precision, choose_precision, has_accelerator
from wlora.training.run_length import make_plan

# Assumed length of a run of unknown length, for methods whose structure depends on the length.
LONG = Steps(total=100_000, per_epoch=10_000)


def describe(config: Config) -> str:
    """Return a description of a run: adapters, parameters, steps, memory, and whether a record exists. Needs no weights.

    For `task.validation=folds=N` it describes the run of the first fold, and lists the records of all folds.
    """
    source = locate(config.model)
    device = Accelerator(cpu=not has_accelerator()).device
    config = settle_growth(config, device)
    precision = choose_precision(config.precision, device)
    task = build_task(config.task)
    rows = _known_rows(config)
    plan = None if rows is None else make_plan(config, rows)
    length = None if plan is None else Steps(total=plan.total_steps, per_epoch=plan.steps_per_epoch)
    method = prepare_method(config, length)
    model = build_unloaded(config.model, _countable(config, source), head=task.head, num_labels=task.num_labels)
    counts = assemble(config, model, method).count_parameters()
    trainable = counts["adapter_initial"] + counts["base"]
    what = "base" if counts["base"] else "adapter"
    steps = "unknown until the data are available"
    if plan is not None:
        # Long texts are split into windows, and their number is unknown before tokenisation.
        least = "at least " if task.head == "question_answering" else ""
        steps = (
            f"{least}{plan.total_steps} ({rows:,} rows, {plan.steps_per_epoch} per epoch, batch {plan.batch_size} × "
            f"{plan.accumulation_steps}), warm-up {plan.warmup}"
        )
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) * precision.dtype.itemsize / 1e9
    parts = ", ".join(f"{frozen / count:.1f} on each of {count}" for count in (2, 4, 8))
    sharded = [f"sharded    {frozen:.1f} GB of frozen base: {parts} processes"] if config.train.fsdp else []
    memory = [f"{'' if i else 'memory':<10} {line}" for i, line in enumerate(_foresee(config, precision, length or LONG))]
    lines = [
        *(f"{'' if i else 'run':<10} {line}" for i, line in enumerate(_list_runs(config, source, precision))),
        f"model      {config.model.name}, {counts['total']:,} parameters, {precision.name} ({precision.reason})",
        f"adapters   {len(method.attached())} of method={config.method['name']}",
        f"trainable  {trainable:,} {what} parameters ({share_of_model(trainable, counts)})",
        *_final(method, counts),
        f"head       {counts['head']:,} trainable parameters of head and pooler",
        *sharded,
        f"steps      {steps}",
        *memory,
    ]
    return "\n".join(lines)


def _final(method: Method, counts: dict[str, int]) -> list[str]:
    """Return a line with the number of adapter parameters at the end of the run, if it differs from the start."""
    found = method.final_count()
    if found is None:
        return ["at the end the number of adapter parameters depends on the run"]
    least, most = found
    if least == most == counts["adapter_initial"]:
        return []
    listed = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    return [f"at the end {listed} adapter parameters ({share_of_model(most, counts)})"]


def _foresee(config: Config, precision: Precision, steps: Steps) -> list[str]:
    """Return lines about the memory of a training step.

    No estimate is possible if shapes depend on values, of a method or of a discovered model.
    """
    try:
        return tell(estimate(config, precision, steps), config)
    except (RuntimeError, ValueError, TypeError) as error:
        return [f"no estimate for method={config.method['name']} ({type(error).__name__})"]


def _list_runs(config: Config, source: ModelSource, precision: Precision) -> list[str]:
    """Return the identity of the run, and whether it has a record; for `task.validation=folds=N`, one line per fold."""
    folds = count_folds(config.task) if config.task.fold is None else None
    lines = []
    for fold in [None] if folds is None else range(folds):
        own = config if fold is None else dataclasses.replace(config, task=dataclasses.replace(config.task, fold=fold))
        run = open_record(own, source, precision).run_id
        lines.append(f"{'' if fold is None else f'fold {fold}: '}{run} ({_known_status(config.results_dir, run)})")
    return lines


def _known_status(results_dir: str, run_id: str) -> str:
    """Return whether a run has a record, and its status."""
    try:
        done = RecordStore(results_dir).load(run_id)
    except ConfigError as damage:
        return f"{damage}; the run would be repeated"
    return f"record exists: {done.status}" if done else "no record yet"


def _known_rows(config: Config) -> int | None:
    """Return the number of training rows without using the network; None if it is unknown."""
    if config.task.path is not None or config.task.generator is not None:
        return len(load_splits(config.task, offline=True).rows["train"])
    return count_train_rows(config.task)


def _countable(config: Config, source: ModelSource) -> dict[str, Any]:
    """Return an architecture that is complete enough to build. Random models get the vocabulary size of their tokenizer."""
    architecture = read_architecture(config.model)
    if "vocab_size" not in architecture:
        architecture["vocab_size"] = len(load_tokenizer(config.model, source))
    return architecture
