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
from wlora.data.sources import fingerprint
from wlora.distributed import from_main, gather
from wlora.errors import ConfigError, TakenOver
from wlora.experiment.build import assemble, prepare_method, read_start
from wlora.experiment.outcome import classify, complete, find_success, keep_results, out_of_memory, write_ending
from wlora.experiment.saving import model_folder, save_model
from wlora.experiment.shared_inputs import SharedInputs
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
    """What the three stages of a run share.

    Attributes:
        record: the run's own, completed on the way.
        signals: what asks the process to stop.
        alone: whether the run trains alone, and so shows its own progress.
        claim: makes the run this process's; set once the lock is held.
        trainer: trains it; set once it is prepared.
        begin: when the run began, in seconds of `time.perf_counter`.
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
        """Where the record goes."""
        return RecordStore(self.config.results_dir, self.claim.put)

    @cached_property
    def checkpoints(self) -> CheckpointStore:
        """Where checkpoints go."""
        return CheckpointStore(self.config.results_dir, self.record.run_id, keep=self.config.train.keep, claim=self.claim)

    @cached_property
    def telling(self) -> bool:
        """Whether the record tells every ending: one of success, of which a part is missing, gives way to success only."""
        earlier = from_main(self.store.read(self.record.run_id))
        return self.accelerator.is_main_process and (self.config.force or earlier is None or earlier.status != "success")

    @cached_property
    def curve(self) -> CurveWriter:
        """The learning curve; asked for first, it is begun anew."""
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
    """Run one configuration, or return its record if it has already succeeded or another process is at it.

    With `train.until` below 1 the run may end with the status `stopped`; the same configuration goes on from there.

    Args:
        config: what `wlora.experiment.resolve.resolve` returned.
        overrides: the words of the command line that asked for it, for the record.
        shared: what this run shares with others of its process; None for nothing.
        keyed: draw dropout as in a pack (`wlora.models.keyed_dropout`); a resumed run goes on as it began.

    Raises:
        ConfigError: the request cannot be run; nothing was written.
        RunFault: the run failed underway; the record says how.
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
    """Take a run from its first step to its end, and return its record.

    Args:
        steps: the course of the run, which has yielded its `Job`.
        compute: leaves the gradients of a step and returns its loss.
    """
    try:
        batches = next(steps)
        while True:
            try:
                computed = compute(batches)
            except BaseException as error:
                steps.throw(error)  # the record tells it
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
    micro-batches of each step and is sent what `compute_gradients` or `Pack.compute` returns for them. A fault of that
    computation must be thrown into it, so that the record tells it.

    Args:
        config: as for `run`.
        overrides: as for `run`.
        shared: as for `run`.
        signals: those of the pack that the run trains in; None if it trains alone.

    Raises:
        ConfigError: as for `run`.
        RunFault: as for `run`.
    """
    job = open_job(config, overrides, signals)
    config, record, accelerator = job.config, job.record, job.accelerator
    store = RecordStore(config.results_dir)
    check_folders(config.results_dir, *_written(config, record.run_id))
    read_start(config)  # what does not fit is told before anything is written or loaded
    lock = RunLock(config.results_dir, record.run_id)
    if done := find_success(store, record.run_id, config):
        return done
    if not from_main(accelerator.is_main_process and lock.acquire()):
        say(f"{record.run_id} is left to {lock.holder()}, which runs it now")
        return record
    with lock.held():
        job.claim = Claim(config.results_dir, lock, from_main(lock.token or ""))
        with job.claim.opened(afresh=config.force) if accelerator.is_main_process else nullcontext():
            try:
                store.load(record.run_id)
            except ConfigError as damage:
                say(f"notice: {damage}; the run is done again")
            # Another process may have finished it between the look and the lock.
            if done := find_success(store, record.run_id, config):
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
    """Open a run and its record; nothing is loaded or written. Arguments as for `course`."""
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not has_accelerator(),
        log_with=None if config.track == "none" else config.track,
        project_dir=str(tracking_folder(config.results_dir)),
    )
    config = from_main(config)  # `tuned` values may have been read from other records a moment later
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
    """Load data and model, and put together what will be trained.

    Raises:
        ConfigError: inputs that cannot be read, do not fit, or have changed since they were hashed.
    """
    config, record = job.config, job.record
    material = shared.material(config, job.source)
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
    """Context manager: a run that stops where `train.until` says so has ended in order."""
    try:
        yield
    except Stopped as stop:
        say(f"stopped    {stop}")


def train(job: Job, trainer: Trainer) -> Generator[Any, Computed | None, Result]:
    """Train to the end, from the newest checkpoint if there is one; the record tells any other ending."""
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
            accelerator.wait_for_everyone()  # a launcher ends the main process once another one has ended
        if record.status == "oom":
            raise out_of_memory(trainer.plan, accelerator.num_processes) from error
        raise
    finally:
        job.curve.close()
        tracker.finish()


def finish(job: Job, trainer: Trainer, result: Result) -> None:
    """Complete the record and write all that a run leaves behind; only then its checkpoints may go."""
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
        say("notice: the checkpoints stay; the same command goes on from the last one and writes what is missing")
    elif not record.error and not config.train.keep_after:  # all that they stand for is on the disk now
        job.checkpoints.remove()


def _written(config: Config, identity: str) -> list[str]:
    """Return the folders of a results folder that a run writes into."""
    tracked = [] if config.track == "none" else ["tracking", f"tracking/{identity}"]
    return [*PARTS, f"checkpoints/{identity}", *tracked]


def _refuse_other_inputs(record: Record) -> None:
    """Refuse processes that do not see the same data, weights or hardware."""
    found = gather(record.run_id)
    if len(set(found)) > 1:
        raise ConfigError(
            f"the processes have come to different runs ({', '.join(found)}): allowed are the same data and weights for "
            "all, and one precision (precision=fp32 works everywhere)"
        )


def open_record(config: Config, source: ModelSource, precision: Precision) -> Record:
    """Open the record of a run that is about to begin; its `run_id` is the hash of all that decides its numbers."""
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
