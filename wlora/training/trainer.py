"""The training loop: accumulate, clip, step, call the method, evaluate. It is independent of single methods and tasks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wlora.data.features import Features
from wlora.distributed import from_main
from wlora.methods.base import Event, Method
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.training_data import TrainingData
from wlora.models.first_token import first_token_alone
from wlora.models.prefix_forward import Prefix, frozen_depth
from wlora.tasks.base import Task
from wlora.training.activation_memory import activation_bytes, saved_bytes
from wlora.training.batch_growth import BatchGrowth
from wlora.training.batch_order import share, step_batches
from wlora.training.best import Best
from wlora.training.evaluation import Evaluation, evaluate
from wlora.training.graphs import Buckets, Graphs
from wlora.training.losses import Losses
from wlora.training.optimizers import Optimizers
from wlora.training.prefetch import Batch, Prefetcher, move
from wlora.training.prefix_cache import PrefixCache, open_cache
from wlora.training.progress import advance, progress_bar
from wlora.training.run_length import Plan
from wlora.training.settings import Computed, Data, Result, Settings
from wlora.training.sharding import check_same_adapters
from wlora.training.state import State, capture, random_streams, restore, set_random_streams

Course = Generator[list[list[int]], Computed, Result]
"""The training of one run, step by step; see `Trainer.course`."""

# Number of points of the learning curve of a whole run.
CURVE_POINTS = 200
FP16_FIRST_SCALE = 2.0**14


class Trainer:
    """Trains one model with one method on one task.

    The constructor has no side effects. Call `begin` before any other method.

    Args:
        head: the trained parameters of head and pooler; empty with `compat=release`.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        method: Method,
        head: list[nn.Parameter],
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        data: Data,
        plan: Plan,
        settings: Settings,
        accelerator: Accelerator,
    ) -> None:
        self.bare_model, self.method, self.head = model, method, head
        self.task, self.tokenizer, self.data = task, tokenizer, data
        self.plan, self.settings, self.accelerator = plan, settings, accelerator
        self.model: nn.Module = model  # wrapped for several processes by `begin`
        self.prefix: PrefixCache | None = None
        self.result = Result()
        self.evaluation: Evaluation | None = None  # the last one
        self.best = Best(settings.best, settings.patience, task.primary_metric)
        self.step = 0
        self.keyed = False  # whether dropout masks are keyed, as in a pack (`wlora.models.keyed_dropout`)
        self.companions: set[str] = set()  # the runs that have shared a pack with this one
        self.parts = 1  # sequential parts per micro-batch; doubled after running out of memory
        self.growth = BatchGrowth(
            settings.grow_batch,
            batch_size=plan.batch_size,
            accumulation_steps=plan.accumulation_steps,
            device=accelerator.device,
        )
        self._before = 0  # the step before the current one
        self.upcoming: list[list[int]] = []  # the micro-batches of the plan's next step
        self.graphs = Graphs() if settings.graphs else None

        def collate(features: list[dict[str, Any]]) -> Batch:
            return task.collate(features, tokenizer)

        rounded = Buckets(data.train, task.head, collate) if settings.graphs and task.any_padding else None
        self.prefetch = Prefetcher(rounded.collate if rounded else lambda rows: collate(data.train.rows(rows)))

    def begin(self) -> None:
        """Let the method make its random draws, and build the optimisers. Call this once, before `restore` or `course`.

        Raises:
            ConfigError: the method needs more training rows than there are.
        """
        data = TrainingData(
            self.bare_model,
            lengths=self.data.train.lengths,
            labels=self.data.train.single_labels,
            collate=lambda rows: self._collate(self.data.train, list(rows)),
        )
        self.phases = self.method.phases(data, self.plan.total_steps)
        self.optimizers = Optimizers(
            self._groups(), weight_decay=self.settings.weight_decay, release=self.method.release_adamw
        )
        device = self.accelerator.device.type
        self.scaler = torch.amp.GradScaler(device, init_scale=FP16_FIRST_SCALE) if self.settings.scale_loss else None
        self.losses = Losses(self.plan.total_steps, self.optimizers.parameters)
        self.model = self._prepare()
        self.prefix = self._open_prefix()

    def capture(self) -> State:
        """Return the state after the current step. Training from the restored state is bit-identical on a CPU.

        Raises:
            Diverged: a loss up to this step is not finite.
        """
        self.losses.read()
        self._note_peak()
        state = capture(self.bare_model, self.method, self.optimizers)
        state.facts |= {"step": self.step, "losses": self.losses.values, "result": dataclasses.asdict(self.result)}
        state.facts |= {"keyed": self.keyed, "companions": sorted(self.companions)}
        state.facts |= {"parts": self.parts, "growth": self.growth.factor, "bytes": self.growth.before}
        state.facts["scaler"] = self.scaler.state_dict() if self.scaler else None
        self.best.save(state)
        return state

    def restore(self, state: State) -> None:
        """Continue from a state of the same run. Call this before `course`."""
        torch.manual_seed(self.settings.dropout_seed)  # for an additional process, which has no saved generator state
        process = self.accelerator.process_index
        restore(state, self.bare_model, self.method, self.optimizers, self._groups, process=process)
        self.model = self._prepare()
        self.prefix = self._open_prefix()
        self.keyed, self.companions = state.facts.get("keyed", False), set(state.facts.get("companions", ()))
        self.step, self.parts, self.losses.values = state.facts["step"], state.facts["parts"], list(state.facts["losses"])
        self.growth.factor, self.growth.before = state.facts["growth"], state.facts["bytes"]
        events = [Event(**event) for event in state.facts["result"]["events"]]
        self.result = Result(**{**state.facts["result"], "events": events})
        if self.scaler:
            self.scaler.load_state_dict(state.facts["scaler"])
        self.best.load(state)

    def course(
        self, log: Callable[[dict[str, Any]], None], on_step: Callable[[Trainer], None] | None = None, *, bar: bool = True
    ) -> Course:
        """Train to the end of the plan. The result has the metrics of the last evaluation.

        At every step, the generator yields the step's micro-batches and must be sent their `Computed` gradients. The caller
        can therefore compute several runs in one pass (`wlora.training.pack`).

        Args:
            log: called with each point of the learning curve.
            on_step: called after every optimiser step, when the state can be saved.
            bar: whether to show a progress bar.

        Raises:
            Diverged: a loss, a score or a trained parameter is not finite.
        """
        self.bare_model.train()  # transformers returns loaded models in evaluation mode
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # discard the peak of the previous run of a sweep
        if self.step == 0:
            torch.manual_seed(self.settings.dropout_seed)
        log_every = math.ceil(self.plan.total_steps / CURVE_POINTS)
        with (
            progress_bar(self.plan.total_steps, shown=bar and self.accelerator.is_main_process) as shown,
            first_token_alone(self.bare_model),
            self.prefetch.running(),
        ):
            for step, batches in self.best.until_exhausted(self._updates()):
                begin = time.perf_counter()
                with self.losses.noticing_divergence(step):
                    self.optimizers.set_schedule(self.step, warmup=self.plan.warmup, total=self.plan.total_steps)
                    asked = time.perf_counter()
                    computed = yield batches
                    begin += time.perf_counter() - asked - computed.seconds  # the rest was spent on other runs
                    self._take_step(step, computed.loss)
                self._before, self.step = self.step, step
                if self.passed(log_every) or self.passed(self.plan.eval_every) or self.losses.due:
                    self.losses.read()
                self.result.train_seconds += time.perf_counter() - begin
                if self.passed(log_every):
                    log({"step": step, "loss": self.losses.take_mean()})
                if self.passed(self.plan.eval_every) or self.plan.stops(step):
                    with self.losses.noticing_divergence(step):
                        log(self._evaluate(step))
                if on_step is not None:
                    on_step(self)
                advance(shown, self.losses.values, self.result.metrics, self.task.primary_metric, self.method)
            # A run that was interrupted between its last evaluation and its end has no predictions yet.
            if self.best.put_back(self.step, self.bare_model, self.method) or self.evaluation is None:
                self._score()
            self.result.events += self.best.events(self.step, self.plan.total_steps)
            self.result.memory |= {"saved": self.measure(saved_bytes)} | (self.prefix.facts() if self.prefix else {})
            self.result.memory |= self.graphs.facts() if self.graphs else {}
        return self.result

    def passed(self, every: int) -> bool:
        """Tell whether the last update reached or passed a multiple of `every` steps, or the end."""
        return self.step // every > self._before // every or self.step == self.plan.total_steps

    def _updates(self) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield the remaining updates: the step that each completes, and its micro-batches.

        After the effective batch has grown, an update uses the rows of several planned steps, at most up to the end of the
        epoch. The learning rate follows the plan as if each of these steps had been taken.
        """
        gathered: list[list[int]] = []
        count = 0
        steps = step_batches(
            self.phases,
            self.data.train.lengths,
            batch_size=self.plan.batch_size,
            accumulation_steps=self.plan.accumulation_steps,
            seed=self.settings.order_seed,
        )
        pairs = itertools.pairwise(itertools.chain(steps, [[]]))
        for step, (batches, upcoming) in enumerate(itertools.islice(pairs, self.step, None), start=self.step + 1):
            self.upcoming = upcoming
            gathered += batches
            count += 1
            if count >= self.growth.steps or step % self.plan.steps_per_epoch == 0 or step == self.plan.total_steps:
                yield step, gathered
                gathered, count = [], 0

    def _take_step(self, step: int, loss: Tensor) -> None:
        """Take one optimiser step with the computed gradients. The mean loss over its rows is not read."""
        self.losses.add(step, loss)
        if step == 1:
            self.optimizers.check(self.bare_model)
        if self.scaler:
            self._unscale(self.scaler)
        self.optimizers.clip(self.settings.max_grad_norm)
        self._restructure(self.method.before_step(step))
        self.optimizers.step()
        if self.scaler:
            self.scaler.update()
        self._restructure(self.method.after_step(step))
        self.optimizers.zero_grad()
        grown = self.growth.observe(step, settled=self.method.settled(step), measure=lambda: self.measure(activation_bytes))
        self.result.events += [grown] if grown else []

    def measure(self, measure: Callable[[nn.Module, dict[str, Tensor]], int]) -> int:
        """Return a measurement on a micro-batch of the longest training rows. The state of the run does not change."""
        self._note_peak()
        streams = random_streams()
        lengths = self.data.train.lengths
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])[: math.ceil(self.plan.batch_size / self.parts)]
        mine = share(longest, self.accelerator.process_index, self.accelerator.num_processes) or longest[:1]
        inputs = self._collate(self.data.train, mine)
        if self.prefix:
            self.prefix.prepare("train", self.data.train)
        with self.autocast(), self.replayed(mine, inputs):
            found = from_main(measure(self.bare_model, inputs))
        self.method.forget_backward()
        self.optimizers.zero_grad()
        set_random_streams(streams)
        return found

    def _note_peak(self) -> None:
        """Store the GPU's peak memory in bytes, because measurements and resumed runs reset the counter."""
        if self.accelerator.device.type == "cuda":
            peak = int(torch.cuda.max_memory_allocated())
            self.result.memory["device"] = max(peak, self.result.memory.get("device", 0))

    def replayed(self, rows: list[int], inputs: dict[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model continues from the stored states of these rows, if there are any."""
        return self.prefix.replay("train", rows, inputs) if self.prefix else contextlib.nullcontext()

    def count(self, rows: list[int]) -> None:
        """Add rows to the number of computed training rows."""
        self.result.examples += len(rows)
        self.result.tokens += sum(self.data.train.lengths[row] for row in rows)

    def _unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Divide the gradients by the loss scale. After an overflow, discard all gradients.

        Without gradients, the step changes no parameter, and the method ignores it.
        """
        if self.optimizers.unscale(scaler):
            self.method.unscale_backward(scaler.get_scale())
        else:
            self.optimizers.zero_grad()
            self.method.forget_backward()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass: lower precision if the base itself is trained, otherwise no effect."""
        dtype = self.settings.autocast
        return torch.autocast(self.accelerator.device.type, dtype=dtype) if dtype else contextlib.nullcontext()

    def _restructure(self, events: list[Event]) -> None:
        """Apply a structural change: rebuild the optimiser groups and prepare the model again."""
        if events:
            for event in events:
                if not event.finite:
                    raise FloatingPointError(f"the numbers of event {event.kind} are not finite")
            self.result.events += events
            if any(event.reset for event in events):
                self.optimizers.forget()
            self.optimizers.rebuild(self._groups())
            check_same_adapters(self.method, self.step + 1)
            self.model = self._prepare()
            self.prefix = self._open_prefix()

    def _open_prefix(self) -> PrefixCache | None:
        """Return the cache for the output of the frozen lower layers; the current one if these layers are the same."""
        depth = frozen_depth(self.bare_model) if self.settings.prefix else 0
        if not self.settings.prefix or not depth:
            return None
        if self.prefix and self.prefix.prefix.depth == depth:
            return self.prefix
        return open_cache(Prefix(self.bare_model, depth), self.settings.prefix, self._collate, self.data.train)

    def _collate(self, features: Features, rows: list[int]) -> dict[str, Tensor]:
        """Convert rows of features to the model's inputs, on its device."""
        return move(self.task.collate(features.rows(rows), self.tokenizer), self.accelerator.device)

    def _groups(self) -> list[ParameterGroup]:
        return [*self.method.groups(self.settings.lr), ParameterGroup(list(self.head), self.settings.head_lr)]

    def _prepare(self) -> nn.Module:
        """Wrap the model for several processes; with one process, return it unchanged.

        Wrapping copies the main process's parameters to all processes, so that random and decomposed values are equal.
        """
        self.model = self.bare_model
        if self.accelerator.num_processes == 1 or self.settings.sharded:
            return self.model
        self.accelerator.free_memory()  # free the previous wrapper, whose reducer keeps removed parameters
        wrapped: nn.Module = self.accelerator.prepare_model(self.bare_model)
        return wrapped

    def _evaluate(self, step: int) -> dict[str, Any]:
        """Evaluate on the dev set; return the point of the learning curve."""
        metrics = self._score()
        self.result.evaluations.append({"step": step, "seconds": self.result.train_seconds})
        if self.passed(self.plan.eval_every):  # an evaluation at a stop (`train.until`) does not count: it is not planned
            self.best.observe(step, metrics, self.bare_model, self.method)
        return {"step": step, "epoch": step / self.plan.steps_per_epoch, "metrics": metrics}

    def _score(self) -> dict[str, float]:
        begin = time.perf_counter()
        with self.autocast():
            self.evaluation = evaluate(
                self.bare_model,
                self.task,
                self.data.validation,
                self.tokenizer,
                batch_size=self.settings.eval_batch_size,
                accelerator=self.accelerator,
                prefix=self.prefix,
                together=self.settings.sharded,
            )
        self.result.metrics = self.evaluation.metrics
        self.result.eval_seconds += time.perf_counter() - begin
        return self.result.metrics
