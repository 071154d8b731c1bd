"""One run, told once, from configuration to record:

config -> task -> model -> adapters -> training loop -> metrics -> record
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from wlora.adapters.adapter_set import count_elements
from wlora.adapters.peft_format import Start, identify_files, read_adapter
from wlora.config.identity import run_id, scientific_fields, stream_seed
from wlora.config.schema import Config
from wlora.console import notice, say
from wlora.data.sources import fingerprint
from wlora.distributed import from_main, gather
from wlora.errors import ConfigError, RunFault, TakenOver, ran_out_of_memory
from wlora.experiment.saving import adapter_folder, model_folder, save_adapter, save_model
from wlora.experiment.shared_inputs import SharedInputs
from wlora.experiment.summary import announce, summarize
from wlora.methods.base import Method, Setting, Steps
from wlora.methods.registry import build_method
from wlora.models.architectures import list_targets, read_architecture
from wlora.models.loading import checkpoint_activations, head_parameters
from wlora.models.quantization import count_model
from wlora.models.source import ModelSource, locate
from wlora.storage.atomic_write import PARTS, Put, check_folders
from wlora.storage.claims import Claim
from wlora.storage.content_hash import changed, read_as_hashed
from wlora.storage.environment import describe_environment, name_elsewhere
from wlora.storage.locks import RunLock
from wlora.storage.records import Record, RecordStore, peak_memory
from wlora.storage.trackers import Tracker, tracking_folder
from wlora.training.batch_growth import settle_growth
from wlora.training.checkpoints import CheckpointStore
from wlora.training.interruption import Guard, Interrupted
from wlora.training.precision import Precision, choose_precision, lower_base
from wlora.training.prefix_cache import Storage
from wlora.training.run_length import Plan, make_plan
from wlora.training.sharding import shard_base
from wlora.training.trainer import Diverged, Result, Settings, Trainer


def run(config: Config, overrides: Sequence[str] = (), stock: SharedInputs | None = None) -> Record:
    """Run one configuration, or return its record if it has already succeeded or another process is at it.

    Args:
        config: what `wlora.config.validation.resolve` returned.
        overrides: the words of the command line that asked for it, for the record.
        stock: what this run shares with others of its process; None for nothing.

    Raises:
        ConfigError: the request cannot be run; nothing was written.
        RunFault: the run failed underway; the record says how.
    """
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not torch.cuda.is_available(),
        log_with=None if config.track == "none" else config.track,
        project_dir=str(tracking_folder(config.results_dir)),
    )
    config = from_main(config)  # `tuned` values may have been read from other records a moment later
    config = settle_growth(config, accelerator.device)
    precision = choose_precision(config.precision, accelerator.device)
    source = locate(config.model)
    record = open_record(config, source, precision)
    record.environment = describe_environment(
        str(accelerator.device), precision.name, accelerator.num_processes, overrides=overrides
    )
    if elsewhere := name_elsewhere(gather(record.environment)):
        record.environment["elsewhere"] = elsewhere
    _refuse_other_inputs(record)
    store = RecordStore(config.results_dir)
    check_folders(config.results_dir, *_written(config, record.run_id))
    read_start(config)  # what does not fit is told before anything is written or loaded
    lock = RunLock(config.results_dir, record.run_id)
    if done := _find_success(store, record.run_id, config):
        return done
    if not from_main(accelerator.is_main_process and lock.acquire()):
        say(f"{record.run_id} is left to {lock.holder()}, which runs it now")
        return record
    with lock.held():
        claim = Claim(config.results_dir, lock, from_main(lock.token or ""))
        with claim.opened(afresh=config.force) if accelerator.is_main_process else nullcontext():
            try:
                store.load(record.run_id)
            except ConfigError as damage:
                say(f"notice: {damage}; the run is done again")
            # Another process may have finished it between the look and the lock.
            return _find_success(store, record.run_id, config) or _run(
                config, accelerator, precision, source, record, claim, stock or SharedInputs(keep=False)
            )


def _written(config: Config, identity: str) -> list[str]:
    """Return the folders of a results folder that a run writes into."""
    tracked = [] if config.track == "none" else ["tracking", f"tracking/{identity}"]
    return [*PARTS, f"checkpoints/{identity}", *tracked]


def _run(
    config: Config,
    accelerator: Accelerator,
    precision: Precision,
    source: ModelSource,
    record: Record,
    claim: Claim,
    stock: SharedInputs,
) -> Record:
    """Run one configuration and complete its record, which is this process's to write."""
    begin = time.perf_counter()
    material = stock.material(config, source)
    task, data = material.task, material.data
    plan = make_plan(config, len(data.train))
    method = prepare_method(config)
    method.plan(Steps(total=plan.total_steps, per_epoch=plan.steps_per_epoch))
    announce(config, record.run_id, plan, precision)

    model = stock.model(
        config,
        source,
        material,
        seed=stream_seed(config.seed, "init"),
        own=method.plain_base or config.train.save_model,
        device=accelerator.device,
        dtype=precision.dtype,
    )
    head = attach(model, method, config)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    lower_base(model, precision)
    if config.train.fsdp:
        shard_base(model, accelerator.device)
    model.to(accelerator.device)
    record.parameters = count_parameters(model, method, head)
    record.model["revision"] = getattr(model.config, "_commit_hash", None)
    if record.task["data"] not in (None, material.splits.fingerprint):
        raise changed(f"task.path={config.task.path}")
    record.task.update(version=material.splits.revision, data=material.splits.fingerprint)
    record.task.update(train_rows=len(material.splits.rows["train"]), **material.unfit)
    record.steps = {"total": plan.total_steps, "per_epoch": plan.steps_per_epoch, "warmup": plan.warmup}

    store = RecordStore(config.results_dir, claim.put)
    checkpoints = CheckpointStore(config.results_dir, record.run_id, keep=config.train.keep, claim=claim)
    tracker = Tracker(accelerator, say=say)
    earlier = from_main(store.read(record.run_id))
    # A record of success, whose model alone is missing, is replaced by another of success only.
    telling = accelerator.is_main_process and (config.force or earlier is None or earlier.status != "success")
    if telling:
        store.write(record)
    curve = store.curve(record.run_id, write=accelerator.is_main_process)
    guard = Guard(checkpoints, claim.lock, curve=curve, record=record, every=plan.checkpoint_every, begin=begin)
    tracker.start(record.run_id, record.config)

    def log(point: dict[str, Any]) -> None:
        curve(point)
        tracker(point)

    with guard.listening():
        try:
            trainer = Trainer(
                model=model,
                method=method,
                head=list(head.values()),
                task=task,
                tokenizer=material.tokenizer,
                data=data,
                plan=plan,
                settings=_loop_settings(config, method, precision, accelerator.process_index),
                accelerator=accelerator,
                log=log,
                on_step=guard,
            )
            guard.resume(trainer)
            result = trainer.run()
        except BaseException as error:
            record.status, record.error = _classify(error)
            record.seconds = {"total": guard.seconds()}
            if telling and not isinstance(error, TakenOver):
                _write_ending(store, record)
            if isinstance(error, Interrupted):
                accelerator.wait_for_everyone()  # a launcher ends the main process once another one has ended
            if record.status == "oom":
                raise _out_of_memory(plan, accelerator.num_processes) from error
            raise
        finally:
            curve.close()
            tracker.finish()
        _complete(record, result, method, guard.seconds())
        record.curve = curve.finish()
        if accelerator.is_main_process:
            record.error = _keep_results(store, record, trainer, config, claim.put)
            say(summarize(record, method, str(store.write(record))))
            if config.train.save_model:
                saved = model_folder(config.results_dir, record.run_id)
                save_model(model, method, material.tokenizer, saved, claim.put)
                say(f"model      {saved}")
            if record.error and checkpoints.present():
                say("notice: the checkpoints stay; the same command goes on from the last one and writes what is missing")
            elif not record.error and not config.train.keep_after:  # all that they stand for is on the disk now
                checkpoints.remove()
        guard.answer(trainer)
    return record


def _write_ending(store: RecordStore, record: Record) -> None:
    """Write how a run ended; what ended it is told and decides what follows, even where this cannot be written."""
    try:
        store.write(record)
    except RunFault as error:
        say(f"notice: {error}")


def _out_of_memory(plan: Plan, processes: int) -> RunFault:
    """Say what takes less memory."""
    if processes == 1:
        return RunFault(
            "out of memory with one row at once: a smaller task.max_length, train.gradient_checkpointing=true or "
            "model.quantization=nf4 takes less"
        )
    return RunFault(
        f"out of memory with task.batch_size={plan.batch_size}: halve it and double train.accumulation_steps, which keeps "
        "the effective batch"
    )


def _keep_results(store: RecordStore, record: Record, trainer: Trainer, config: Config, put: Put) -> str | None:
    """Write predictions and adapters; a run is not lost because one of them cannot be: returns what, None for nothing."""
    failed = []
    if trainer.evaluation is not None:  # else resumed after its last evaluation
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


def _find_success(store: RecordStore, identity: str, config: Config) -> Record | None:
    """Return the record of a run that has succeeded and is not to be run again, as the main process finds it.

    A run of which something could not be saved goes on from its checkpoints, if they are still there, and saves it.
    """
    done = from_main(store.read(identity))
    if done is None or done.status != "success" or config.force:
        return None
    saved = model_folder(config.results_dir, identity)
    lacks_model = config.train.save_model and not saved.is_dir()
    missing = f"its model is not there ({saved})" if lacks_model else done.error
    if from_main(bool(missing) and CheckpointStore(config.results_dir, identity, keep=config.train.keep).present()):
        notice(f"{identity} is done, but {missing}: it goes on from its checkpoint and saves it")
        return None
    say(f"{identity} is done: {done.primary_metric} {done.metrics[done.primary_metric]:.4f} ({store.path(identity)})")
    try:
        store.read_curve(done)
    except ConfigError as damage:
        say(f"notice: {damage}; force=true does the run again and writes it")
    if missing:
        say(f"notice: {missing}: force=true does the run again and saves it")
    return done


def _refuse_other_inputs(record: Record) -> None:
    """Refuse processes that do not see the same data, weights or hardware."""
    found = gather(record.run_id)
    if len(set(found)) > 1:
        raise ConfigError(
            f"the processes have come to different runs ({', '.join(found)}): allowed are the same data and weights for "
            "all, and one precision (precision=fp32 works everywhere)"
        )


def prepare_method(config: Config) -> Method:
    """Build the policy that a configuration asks for.

    Raises:
        ConfigError: it does not go with the base or with `adapter.path`.
    """
    return build_method(
        config.method,
        release=config.compat == "release",
        quantized=config.model.quantization != "none",
        started=config.adapter.path is not None,
    )


def attach(model: PreTrainedModel, method: Method, config: Config) -> dict[str, nn.Parameter]:
    """Attach the method's adapters to a frozen model and let the head train; returns the head's trainable parameters.

    In `compat=release` the head keeps its random initialisation, as in the release (methods note §1.3). With `adapter.path`
    the modules that have an adapter there get one here, which starts from it.

    Raises:
        ConfigError: an adapter or head that does not fit the model, or an adapter outside the target set.
    """
    architecture = model.config.to_dict()
    torch.manual_seed(stream_seed(config.seed, "adapters"))
    choice = torch.Generator().manual_seed(stream_seed(config.seed, "choice"))
    targets = list_targets(architecture, config.method.get("targets", config.targets))
    start = read_start(config)
    if start.adapters:
        targets = [target for target in targets if target.name in start.adapters]
    method.attach(model, Setting(targets, list_targets(architecture, "all"), choice, start.adapters))
    if config.adapter.head:
        _start_head(model, start, config)
    head = {} if config.compat == "release" else head_parameters(model)
    for parameter in head.values():
        parameter.requires_grad_(True)
    return head


def read_start(config: Config) -> Start:
    """Read what `adapter.path` holds; nothing without it.

    Raises:
        ConfigError: a damaged folder, or an adapter outside the target set.
    """
    if config.adapter.path is None:
        return Start({}, {})
    path = config.adapter.path
    with read_as_hashed(f"adapter.path={path}", config.adapter.fingerprint, lambda: identify_files(path)):
        start = read_adapter(path)
    targets = {target.name for target in list_targets(read_architecture(config.model), config.targets)}
    strange = sorted(set(start.adapters) - targets)
    if strange:
        raise ConfigError(
            f"adapter.path={config.adapter.path}: has an adapter on {strange[0]}, which is not among the {len(targets)} "
            f"targets={config.targets} of model={config.model.name}\nallowed is a target set with all {len(start.adapters)}"
        )
    return start


def _start_head(model: PreTrainedModel, start: Start, config: Config) -> None:
    """Let head and pooler start from those of `adapter.path`."""
    for name, parameter in head_parameters(model).items():
        given = start.head.get(name)
        if given is None or given.shape != parameter.shape:
            there = "missing" if given is None else f"of shape {list(given.shape)}"
            raise ConfigError(
                f"adapter.head=true: {name} is {there} in {config.adapter.path}, the task asks for {list(parameter.shape)}: "
                "allowed is false, for a fresh head"
            )
        parameter.data.copy_(given)


def count_parameters(model: nn.Module, method: Method, head: dict[str, nn.Parameter]) -> dict[str, int]:
    """Count elements: adapters at the start (for full fine-tuning the base), trainable head, and the bare model.

    `total` counts the model's elements as its architecture has them, `stored` as a quantised base packs them.
    """
    in_head = {id(p) for p in head.values()}
    adapters = method.attached().values()
    in_adapters = {id(p) for a in adapters for p in a.parameters()}
    base = [p for p in model.parameters() if id(p) not in in_adapters]
    trainable_base = sum(p.numel() for p in base if p.requires_grad and id(p) not in in_head)
    logical, stored = count_model(model, without=in_adapters)
    return {
        "adapter_initial": count_elements(adapters),
        "adapter_final": count_elements(adapters),
        "base": trainable_base,
        "head": sum(p.numel() for p in head.values()),
        "total": logical,
        "stored": stored,
    }


def open_record(config: Config, source: ModelSource, precision: Precision) -> Record:
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


def _loop_settings(config: Config, method: Method, precision: Precision, process: int) -> Settings:
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
        grow_batch=config.train.grow_batch,
        prefix=_prefix_storage(config),
    )


def _prefix_storage(config: Config) -> Storage | None:
    """Return where `train.prefix_cache` keeps its states; None if it is off."""
    train = config.train
    if train.prefix_cache == "off":
        return None
    return Storage(
        kind="disk" if train.prefix_cache == "disk" else "memory",
        dtype=torch.bfloat16 if train.prefix_cache_dtype == "bf16" else torch.float32,
        limit=int(train.prefix_cache_gb * 2**30),
        folder=Path(config.results_dir) / "prefix_cache",
    )


def _complete(record: Record, result: Result, method: Method, seconds: float) -> None:
    """Fill in what a finished training left behind."""
    kept = method.kept()
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


def _classify(error: BaseException) -> tuple[str, str]:
    """Return the honest status of a run that did not finish, and what ended it."""
    text = "".join(traceback.format_exception_only(error)).strip()
    if isinstance(error, Diverged):
        return "diverged", text
    if ran_out_of_memory(error):
        return "oom", text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", text
    return "failed", text
