"""One run, from configuration to record, in three stages: prepare, train, finish."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from accelerate import Accelerator

from wlora.config.identity import run_id, scientific_fields, stream_seed
from wlora.config.schema import Config
from wlora.console import say
from wlora.data.hub import go_offline
from wlora.data.sources import fingerprint
from wlora.distributed import from_main, gather
from wlora.errors import ConfigError, TakenOver
from wlora.experiment.build import assemble, prepare_method, read_start
from wlora.experiment.outcome import classify, complete, find_ended, keep_results, out_of_memory, write_ending
from wlora.experiment.saving import model_folder, save_model
from wlora.experiment.shared_inputs import SharedInputs, require_best
from wlora.experiment.summary import announce, summarize
from wlora.methods.base import Method, Steps
from wlora.models.source import ModelSource, locate
from wlora.storage.atomic_write import PARTS, check_folders
from wlora.storage.claims import Claim
from wlora.storage.content_hash import changed
from wlora.storage.curve_writer import CurveWriter
from wlora.storage.environment import describe_environment, name_elsewhere
from wlora.storage.locks import RunLock
from wlora.storage.records import Record, RecordStore
from wlora.storage.trackers import Tracker, tracking_folder
from wlora.training.batch_growth import settle_growth
from wlora.training.checkpoints import CheckpointStore
from wlora.training.gradients import compute_gradients
from wlora.training.graphs import settle_graphs
from wlora.training.interruption import Guard, Interrupted, Stopped, StopSignals
from wlora.training.pack import Pack
from wlora.training.precision import Precision, choose_precision, has_accelerator
from wlora.training.prefix_cache import storage_of
from wlora.training.run_length import make_plan
from wlora.training.settings import Computed, Result, Settings
from wlora.training.trainer import Trainer


@dataclass
class Job:
    """The state that the three stages of a run share.

    Attributes:
        record: the run's record, which the stages complete.
        signals: the signals that ask the process to stop.
        alone: whether the run trains alone and therefore shows its own progress bar.
        claim: this process's right to write the run's files; set when the lock is held.
        trainer: the trainer; set at the end of `prepare`.
        begin: the value of `time.perf_counter` at the start of the run, in seconds.
    """

    config: Config
    accelerator: Accelerator
    precision: Precision
    source: ModelSource
    record: Record
    signals: StopSignals
    alone: bool
    begin: float = field(default_factory=time.perf_counter)
    claim: Claim = field(init=False)
    trainer: Trainer = field(init=False)

    @cached_property
    def store(self) -> RecordStore:
        """The store of the record."""
        return RecordStore(self.config.results_dir, self.claim.put)

    @cached_property
    def checkpoints(self) -> CheckpointStore:
        """The store of the checkpoints."""
        return CheckpointStore(self.config.results_dir, self.record.run_id, keep=self.config.train.keep, claim=self.claim)

    @cached_property
    def telling(self) -> bool:
        """Whether a failure is recorded. False if a successful record exists: only a new success may replace it."""
        earlier = from_main(self.store.read(self.record.run_id))
        return self.accelerator.is_main_process and (self.config.force or earlier is None or earlier.status != "success")

    @cached_property
    def curve(self) -> CurveWriter:
        """The learning curve. The first access starts a new curve."""
        return self.store.curve(self.record.run_id, write=self.accelerator.is_main_process)

    @cached_property
    def guard(self) -> Guard:
        """Checkpoints, signals and resume."""
        return Guard(
            self.checkpoints,
            self.claim.lock,
            curve=self.curve,
            record=self.record,
            signals=self.signals,
            begin=self.begin,
        )


Course = Generator[Any, Computed | None, Record]
"""One run, step by step; see `course`."""


def run(config: Config, overrides: Sequence[str] = (), shared: SharedInputs | None = None, *, keyed: bool = False) -> Record:
    """Run one configuration. Return its record without training if it has succeeded, or if another process is running it.

    With `train.until` below 1, the run may end with the status `stopped`. The same configuration continues from there.

    Args:
        config: the result of `wlora.experiment.resolve.resolve`.
        overrides: the command-line arguments, for the record.
        shared: the cache of data and models of this process; None for no sharing.
        keyed: draw dropout masks as in a pack (`wlora.models.keyed_dropout`). A resumed run keeps its original kind.

    Raises:
        ConfigError: the configuration cannot be run; nothing was written.
        RunFault: the run failed after its start; the record contains the reason.
    """
    steps = course(config, overrides, shared)
    try:
        trainer = next(steps).trainer
    except StopIteration as end:
        done: Record = end.value
        return done
    trainer.keyed |= keyed and trainer.step == 0
    pack = Pack(trainer) if trainer.keyed else None

    def compute(batches: list[list[int]]) -> Computed:
        return pack.compute([(trainer, batches)])[0] if pack else compute_gradients(trainer, batches)

    return drive(steps, compute)


def drive(steps: Course, compute: Callable[[list[list[int]]], Computed]) -> Record:
    """Execute a run from its first step to its end, and return its record.

    Args:
        steps: the generator `course`, which has yielded its `Job`.
        compute: computes the gradients of a step and returns its loss.
    """
    try:
        batches = next(steps)
        while True:
            try:
                computed = compute(batches)
            except BaseException as error:
                steps.throw(error)  # `course` writes the error to the record
                raise
            batches = steps.send(computed)
    except StopIteration as end:
        record: Record = end.value
        return record


def course(
    config: Config,
    overrides: Sequence[str] = (),
    shared: SharedInputs | None = None,
    *,
    signals: StopSignals | None = None,
) -> Course:
    """Run one configuration step by step, and return its record.

    The generator first yields the `Job`, ready for its first step, unless there is nothing to train. Then it yields the
    micro-batches of each step, and the caller must send the result of `compute_gradients` or `Pack.compute` for them. If
    that computation fails, the caller must throw the error into the generator, which writes it to the record.

    Args:
        config: as for `run`.
        overrides: as for `run`.
        shared: as for `run`.
        signals: the signals of the pack in which the run trains; None if it trains alone.

    Raises:
        ConfigError: as for `run`.
        RunFault: as for `run`.
    """
    if config.offline:
        go_offline()  # a command has done it before; a script that calls `run` has not
    job = open_job(config, overrides, signals)
    config, record, accelerator = job.config, job.record, job.accelerator
    store = RecordStore(config.results_dir)
    check_folders(config.results_dir, *_written(config, record.run_id))
    read_start(config)  # raise errors before anything is written or loaded
    lock = RunLock(config.results_dir, record.run_id)
    if done := find_ended(store, record.run_id, config):
        return done
    if not from_main(accelerator.is_main_process and lock.acquire()):
        say(f"{record.run_id} is skipped: {lock.holder()} is running it")
        return record
    with lock.held():
        job.claim = Claim(config.results_dir, lock, from_main(lock.token or ""))
        with job.claim.opened(afresh=config.force) if accelerator.is_main_process else nullcontext():
            try:
                store.load(record.run_id)
            except ConfigError as damage:
                say(f"notice: {damage}; the run is repeated")
            # Another process may have finished the run between the check and the lock.
            if done := find_ended(store, record.run_id, config):
                return done
            trainer = job.trainer = prepare(job, shared or SharedInputs(keep=False))
            if job.telling:
                job.store.write(record)
            with job.signals.listening():
                with stopping():
                    result = yield from train(job, trainer)
                    finish(job, trainer, result)
                job.guard.answer(trainer)
            return record


def open_job(config: Config, overrides: Sequence[str], signals: StopSignals | None) -> Job:
    """Create the job and the record of a run. Nothing is loaded or written. The arguments are those of `course`."""
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not has_accelerator(),
        log_with=None if config.track == "none" else config.track,
        project_dir=str(tracking_folder(config.results_dir)),
    )
    config = settle_growth(config, accelerator.device)
    config = settle_graphs(config, accelerator.device, accelerator.num_processes)
    precision = choose_precision(config.precision, accelerator.device)
    source = locate(config.model)
    record = open_record(config, source, precision)
    record.environment = describe_environment(
        str(accelerator.device), precision.name, accelerator.num_processes, overrides=overrides
    )
    if elsewhere := name_elsewhere(gather(record.environment)):
        record.environment["elsewhere"] = elsewhere
    _refuse_other_inputs(record)
    return Job(config, accelerator, precision, source, record, signals or StopSignals(), signals is None)


def prepare(job: Job, shared: SharedInputs) -> Trainer:
    """Load data and model, and build the trainer.

    Raises:
        ConfigError: inputs cannot be read, do not fit, or have changed since they were hashed.
    """
    config, record = job.config, job.record
    material = shared.material(config, job.source)
    require_best(config, material.splits)
    plan = make_plan(config, len(material.data.train))
    method = prepare_method(config, Steps(total=plan.total_steps, per_epoch=plan.steps_per_epoch))
    announce(config, record.run_id, plan, job.precision)
    model = shared.model(
        config,
        job.source,
        material,
        seed=stream_seed(config.seed, "init"),
        own=method.plain_base or config.train.save_model,
        device=job.accelerator.device,
        dtype=job.precision.dtype,
    )
    assembly = assemble(config, model, method, job.precision, job.accelerator.device)
    record.parameters = assembly.count_parameters()
    record.model["revision"] = getattr(model.config, "_commit_hash", None)
    if record.task["data"] not in (None, material.splits.fingerprint):
        raise changed(f"task.path={config.task.path}")
    record.task.update(version=material.splits.revision, data=material.splits.fingerprint)
    record.task.update(train_rows=len(material.splits.rows["train"]), **material.unfit)
    record.steps = {"total": plan.total_steps, "per_epoch": plan.steps_per_epoch, "warmup": plan.warmup}
    return Trainer(
        model=model,
        method=method,
        head=list(assembly.head.values()),
        task=material.task,
        tokenizer=material.tokenizer,
        data=material.data,
        plan=plan,
        settings=_settings(config, method, job.precision, job.accelerator.process_index),
        accelerator=job.accelerator,
    )


@contextmanager
def stopping() -> Iterator[None]:
    """Context manager: print a line if the run stops at `train.until`, and suppress the exception."""
    try:
        yield
    except Stopped as stop:
        say(f"stopped    {stop}")


def train(job: Job, trainer: Trainer) -> Generator[Any, Computed | None, Result]:
    """Train to the end, from the newest checkpoint if there is one. If training fails, write the reason to the record."""
    record, accelerator = job.record, job.accelerator
    tracker = Tracker(accelerator, say=say)
    tracker.start(record.run_id, record.config)

    def log(point: dict[str, Any]) -> None:
        job.curve(point)
        tracker(point)

    try:
        trainer.begin()
        job.guard.resume(trainer)
        yield job
        return (yield from trainer.course(log, job.guard, bar=job.alone))
    except BaseException as error:
        record.status, record.error = classify(error)
        record.seconds = {"total": job.guard.seconds()}
        if isinstance(error, Stopped):
            record.steps["stopped"] = error.step
        if job.telling and not isinstance(error, TakenOver):
            write_ending(job.store, record)
        if isinstance(error, Interrupted):
            accelerator.wait_for_everyone()  # when any process ends, a launcher terminates the main process
        if record.status == "oom":
            raise out_of_memory(trainer.plan, accelerator.num_processes) from error
        raise
    finally:
        job.curve.close()
        tracker.finish()


def finish(job: Job, trainer: Trainer, result: Result) -> None:
    """Complete the record and write all results. The checkpoints are removed afterwards."""
    config, record = job.config, job.record
    complete(record, trainer, result, job.guard.seconds())
    record.curve = job.curve.finish()
    if not job.accelerator.is_main_process:
        return
    record.error = keep_results(job.store, record, trainer, config, job.claim.put)
    say(summarize(record, trainer.method, str(job.store.write(record))))
    if config.train.save_model:
        saved = model_folder(config.results_dir, record.run_id)
        save_model(trainer.bare_model, trainer.method, trainer.tokenizer, saved, job.claim.put)
        say(f"model      {saved}")
    if record.error and job.checkpoints.present():
        say("notice: the checkpoints are kept; the same command continues from the last one and writes what is missing")
    elif not record.error and not config.train.keep_after:  # all results are on disk, so checkpoints are no longer needed
        job.checkpoints.remove()


def _written(config: Config, identity: str) -> list[str]:
    """Return the subfolders of a results folder into which a run writes."""
    tracked = [] if config.track == "none" else ["tracking", f"tracking/{identity}"]
    return [*PARTS, f"checkpoints/{identity}", *tracked]


def _refuse_other_inputs(record: Record) -> None:
    """Raise an error if the processes of a run have different data, weights or precision."""
    found = gather(record.run_id)
    if len(set(found)) > 1:
        raise ConfigError(
            f"the processes have computed different run_ids ({', '.join(found)}): all need the same data, weights and "
            "precision (precision=fp32 works everywhere)"
        )


def open_record(config: Config, source: ModelSource, precision: Precision) -> Record:
    """Create the record of a new run. Its `run_id` is the hash of everything that determines its numbers."""
    data = fingerprint(config.task)
    fields = scientific_fields(config, task_data=data, model_data=source.fingerprint, precision=precision.name)
    return Record(
        run_id=run_id(fields),
        status="running",
        config=dataclasses.asdict(config),
        task={"name": config.task.name, "data": data},
        model={"name": config.model.name, "fingerprint": source.fingerprint},
        primary_metric=config.task.primary_metric,
    )


def _settings(config: Config, method: Method, precision: Precision, process: int) -> Settings:
    return Settings(
        lr=config.lr,
        head_lr=config.head_lr or config.lr,
        weight_decay=config.train.weight_decay,
        max_grad_norm=config.train.max_grad_norm,
        eval_batch_size=config.task.eval_batch_size,
        order_seed=stream_seed(config.seed, "order"),
        dropout_seed=stream_seed(config.seed, f"dropout/{process}" if process else "dropout"),
        scale_loss=precision.name == "fp16",
        sharded=config.train.fsdp,
        autocast=precision.dtype if method.base_parameters and precision.name != "fp32" else None,
        graphs=config.train.compile == "graphs",
        grow_batch=config.train.grow_batch,
        best=config.train.best,
        patience=config.train.patience,
        prefix=storage_of(config),
    )
