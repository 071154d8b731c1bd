"""Packed sweeps (`hydra/launcher=packed`): runs with the same model and data train together."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wlora.config.schema import Config
from wlora.console import say
from wlora.experiment.run import Course, Job, course, drive
from wlora.experiment.shared_inputs import inputs_of_process
from wlora.methods.registry import method_class
from wlora.storage.records import Record
from wlora.training.gradients import compute_gradients
from wlora.training.interruption import StopSignals
from wlora.training.pack import Pack


class Entry(NamedTuple):
    """A run of a sweep: its resolved configuration and its command-line arguments."""

    config: Config
    overrides: Sequence[str]


@dataclass
class _Active:
    """A run in training: its index among the entries, its generator (`course`), and the micro-batches to compute next."""

    index: int
    steps: Course
    job: Job
    batches: list[list[int]]


def why_alone(config: Config) -> str | None:
    """Return the reason why a run cannot train in a pack; None if it can."""
    train = config.train
    reasons = {
        f"method={config.method['name']}": not method_class(config.method["name"]).packable,
        f"train.prefix_cache={train.prefix_cache}": train.prefix_cache != "off",
        f"train.grow_batch={train.grow_batch}": train.grow_batch == "effective",
        f"train.compile={train.compile}": train.compile != "off",
        "train.gradient_checkpointing=true": train.gradient_checkpointing,
        "train.save_model=true": train.save_model,
        "train.fsdp=true": train.fsdp,
        f"model.quantization={config.model.quantization}": config.model.quantization != "none",
        "compat=release": config.compat == "release",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def group(entries: Sequence[Entry]) -> list[list[int]]:
    """Return the indices of the entries by pack. The runs of a pack have equal model, data, precision and batch shape."""
    packs: dict[str, list[int]] = {}
    for index, (config, _) in enumerate(entries):
        train = config.train
        parts = [dataclasses.asdict(config.model), dataclasses.asdict(config.task), config.precision, config.results_dir]
        shape = json.dumps([*parts, train.accumulation_steps, train.fast_step], sort_keys=True, default=str)
        packs.setdefault(f"alone/{index}" if why_alone(config) else shape, []).append(index)
    return list(packs.values())


def run_pack(
    entries: Sequence[Entry], chosen: Sequence[int], size: int | None
) -> Iterator[tuple[int, Record | BaseException]]:
    """Train the runs of one pack. When a run ends, yield its index and its record or error.

    A run that ends is replaced by the next one. An interruption stops all runs after their current step.

    Args:
        entries: all runs of the sweep.
        chosen: the indices of those in this pack (`group`).
        size: maximum number of simultaneous runs; None for as many as fit into memory.

    Raises:
        KeyboardInterrupt: a signal asked to stop; every run in training has saved its state.
    """
    signals, waiting, active = StopSignals(), deque(chosen), list[_Active]()
    stopped: list[KeyboardInterrupt] = []
    pack: Pack | None = None
    with signals.listening():
        while waiting or active:
            if waiting and not stopped and (pack is None or len(active) < (size or pack.capacity)):
                index = waiting.popleft()
                found = _start(index, entries[index], signals)
                if isinstance(found, _Active):
                    pack = _join(pack, found, active)
                    active.append(found)
                else:
                    yield index, found
                continue
            if not active:
                break
            assert pack is not None
            for run, outcome in _step(pack, active):
                active.remove(run)
                pack.leave(run.job.trainer)
                if isinstance(outcome, KeyboardInterrupt):
                    stopped.append(outcome)
                else:
                    yield run.index, outcome
    if stopped:
        raise stopped[0]


def _start(index: int, entry: Entry, signals: StopSignals) -> _Active | Record | Exception:
    """Prepare a run for its first step. Return a record or an error if it needs no step, fails, or must continue alone."""
    steps = course(entry.config, entry.overrides, inputs_of_process(), signals=signals)
    try:
        job: Job = next(steps)
        trainer = job.trainer
        if trainer.step > 0 and not trainer.keyed:
            say(f"{job.record.run_id} was started alone and continues alone")
            return drive(steps, lambda batches: compute_gradients(trainer, batches))
        trainer.keyed = True
        return _Active(index, steps, job, next(steps))
    except StopIteration as end:
        record: Record = end.value
        return record
    except Exception as error:
        return error


def _join(pack: Pack | None, run: _Active, others: Sequence[_Active]) -> Pack:
    """Add a run to a pack, or create the pack for the first run. Record which runs train together."""
    trainer = run.job.trainer
    if pack is None:
        pack = Pack(trainer)
    else:
        pack.join(trainer)
    for other in others:
        other.job.trainer.companions.add(run.job.record.run_id)
        trainer.companions.add(other.job.record.run_id)
    return pack


def _step(pack: Pack, active: Sequence[_Active]) -> list[tuple[_Active, Record | BaseException]]:
    """Take one optimiser step with every run. Return the runs that have ended, with their records or errors."""
    ended: list[tuple[_Active, Record | BaseException]] = []
    try:
        computed = pack.compute([(run.job.trainer, run.batches) for run in active])
    except BaseException as error:
        # The computation is shared, so all runs fail, and each record contains the error.
        for run in active:
            try:
                run.steps.throw(error)
            except BaseException as own:
                ended.append((run, own))
        return ended
    for run, result in zip(active, computed, strict=True):
        try:
            run.batches = run.steps.send(result)
        except StopIteration as end:
            ended.append((run, end.value))
        except (Exception, KeyboardInterrupt) as error:
            ended.append((run, error))
    return ended
