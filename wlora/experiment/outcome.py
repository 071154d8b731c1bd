"""The end of a run: status and content of its record, and the other files that are kept."""

from __future__ import annotations

import traceback

from wlora.adapters.adapter_set import count_elements
from wlora.config.schema import Config
from wlora.console import notice, say
from wlora.distributed import from_main
from wlora.errors import ConfigError, RunFault, TakenOver, ran_out_of_memory
from wlora.experiment.saving import adapter_folder, model_folder, save_adapter
from wlora.storage.atomic_write import Put
from wlora.storage.environment import peak_memory
from wlora.storage.records import Record, RecordStore
from wlora.training.checkpoints import CheckpointStore
from wlora.training.interruption import Stopped
from wlora.training.losses import Diverged
from wlora.training.run_length import Plan
from wlora.training.settings import Result
from wlora.training.trainer import Trainer


def find_ended(store: RecordStore, identity: str, config: Config) -> Record | None:
    """Return the record of a successful run that need not run again, as read by the main process; otherwise None.

    If a part of the run's results could not be saved and its checkpoints still exist, the result is None: the run then
    continues from its last checkpoint and saves that part.

    Raises:
        Diverged: the run has diverged before, and would again.
    """
    done = from_main(store.read(identity))
    if done is None or config.force:
        return None
    if done.status == "diverged":
        raise Diverged(f"{identity} has diverged before: {done.error}; force=true repeats it")
    if done.status != "success":
        return None
    saved = model_folder(config.results_dir, identity)
    lacks_model = config.train.save_model and not saved.is_dir()
    missing = f"its model is missing ({saved})" if lacks_model else done.error
    if from_main(bool(missing) and CheckpointStore(config.results_dir, identity, keep=config.train.keep).present()):
        notice(f"{identity} is done, but {missing}: it continues from its checkpoint and saves it")
        return None
    say(f"{identity} is done: {done.primary_metric} {done.metrics[done.primary_metric]:.4f} ({store.path(identity)})")
    try:
        store.read_curve(done)
    except ConfigError as damage:
        say(f"notice: {damage}; force=true repeats the run and writes it")
    if missing:
        say(f"notice: {missing}: force=true repeats the run and saves it")
    return done


def complete(record: Record, trainer: Trainer, result: Result, seconds: float) -> None:
    """Add the results of a finished training to the record."""
    kept = trainer.method.kept()
    if trainer.keyed:
        record.packed = {"dropout": "keyed", "with": sorted(trainer.companions)}
    record.status, record.trained = "success", True
    record.metrics = {key: float(value) for key, value in result.metrics.items()}
    record.parameters["adapter_final"] = count_elements(kept.values())
    record.adapters = [
        {"name": name, "omega": None if a.omega is None else float(a.omega.detach()), "rank": a.rank}
        for name, a in kept.items()
    ]
    record.events = [{"step": event.step, "kind": event.kind, **event.details} for event in result.events]
    record.seconds = {
        "train": result.train_seconds,
        "eval": result.eval_seconds,
        "total": seconds,
    }
    record.throughput = {
        "examples_per_second": result.examples / result.train_seconds,
        "tokens_per_second": result.tokens / result.train_seconds,
    }
    record.evaluations = result.evaluations
    record.memory = peak_memory() | result.memory


def keep_results(store: RecordStore, record: Record, trainer: Trainer, config: Config, put: Put) -> str | None:
    """Write predictions and adapters. A write error does not fail the run: return its message, or None."""
    failed = []
    if trainer.evaluation is not None:  # None: the run was resumed after its last evaluation
        record.classes = trainer.evaluation.describe_classes(trainer.task, trainer.data.validation)
        try:
            table = trainer.evaluation.tabulate(trainer.task, trainer.data.validation)
            record.predictions = store.write_predictions(record.run_id, table)
        except OSError as error:
            failed.append(f"the predictions of {record.run_id} cannot be written ({error.strerror})")
    if config.train.save_adapter:
        folder = adapter_folder(config.results_dir, record.run_id)
        record.model["adapter"] = None
        try:
            record.model |= save_adapter(trainer.bare_model, trainer.method, folder, kind=trainer.task.head, put=put)
        except TakenOver:
            raise
        except RunFault as error:
            failed.append(str(error))
    for text in failed:
        say(f"notice: {text}")
    return "; ".join(failed) or None


def classify(error: BaseException) -> tuple[str, str]:
    """Return the status of a run that did not finish, and the error message."""
    text = "".join(traceback.format_exception_only(error)).strip()
    if isinstance(error, Diverged):
        return "diverged", text
    if ran_out_of_memory(error):
        return "oom", text
    if isinstance(error, Stopped):
        return "stopped", str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", text
    return "failed", text


def write_ending(store: RecordStore, record: Record) -> None:
    """Write the record of a failed run. A write error is only printed, so that it does not replace the run's error."""
    try:
        store.write(record)
    except RunFault as error:
        say(f"notice: {error}")


def out_of_memory(plan: Plan, processes: int) -> RunFault:
    """Build the error for exhausted memory, with settings that need less."""
    if processes == 1:
        return RunFault(
            "out of memory with one row at once: a smaller task.max_length, train.gradient_checkpointing=true or "
            "model.quantization=nf4 needs less memory"
        )
    return RunFault(
        f"out of memory with task.batch_size={plan.batch_size}: halve it and double train.accumulation_steps, which keeps "
        "the effective batch"
    )
