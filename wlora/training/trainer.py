"""The training loop: accumulate, clip, step, let the method act, evaluate. It knows no method and no task by name."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wlora.data.features import Features
from wlora.distributed import from_main
from wlora.errors import ran_out_of_memory
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
from wlora.training.losses import Losses
from wlora.training.optimizers import Optimizers
from wlora.training.prefetch import Prefetcher, move
from wlora.training.prefix_cache import PrefixCache
from wlora.training.progress import advance, progress_bar
from wlora.training.run_length import Plan
from wlora.training.settings import Data, Result, Settings
from wlora.training.sharding import average_gradients, check_same_adapters
from wlora.training.state import State, capture, random_streams, restore, set_random_streams

# Points of the learning curve over a whole run.
CURVE_POINTS = 200
FP16_FIRST_SCALE = 2.0**14


class Trainer:
    """Trains one model with one method on one task.

    Args:
        head: parameters of head and pooler that train; empty in the release.

    Building one changes nothing; `begin` comes first.
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
        self.evaluation: Evaluation | None = None  # the last
        self.best = Best(settings.best, settings.patience, task.primary_metric)
        self.step = 0
        self.parts = 1  # in which a micro-batch is computed, one after the other
        self.growth = BatchGrowth(
            settings.grow_batch,
            batch_size=plan.batch_size,
            accumulation_steps=plan.accumulation_steps,
            device=accelerator.device,
        )
        self._before = 0  # the step before the present one
        self._upcoming: list[list[int]] = []  # the micro-batches of the plan's next step
        self._prefetch = Prefetcher(lambda rows: task.collate(data.train.rows(rows), tokenizer))

    def begin(self) -> None:
        """Draw what the method draws, and build the optimisers; called once, before `restore` or `run`.

        Raises:
            ConfigError: the method asks for more training rows than there are.
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
        """Return the state after the present step: what `restore` goes on from, bit for bit on a CPU.

        Raises:
            Diverged: a loss up to this step is not finite.
        """
        self.losses.read()
        self._note_peak()
        state = capture(self.bare_model, self.method, self.optimizers)
        state.facts |= {"step": self.step, "losses": self.losses.values, "result": dataclasses.asdict(self.result)}
        state.facts |= {"parts": self.parts, "growth": self.growth.factor, "bytes": self.growth.before}
        state.facts["scaler"] = self.scaler.state_dict() if self.scaler else None
        self.best.save(state)
        return state

    def restore(self, state: State) -> None:
        """Go on from a state of the same run; call it before `run`."""
        torch.manual_seed(self.settings.dropout_seed)  # for a process more than there were
        process = self.accelerator.process_index
        restore(state, self.bare_model, self.method, self.optimizers, self._groups, process=process)
        self.model = self._prepare()
        self.prefix = self._open_prefix()
        self.step, self.parts, self.losses.values = state.facts["step"], state.facts["parts"], list(state.facts["losses"])
        self.growth.factor, self.growth.before = state.facts["growth"], state.facts["bytes"]
        events = [Event(**event) for event in state.facts["result"]["events"]]
        self.result = Result(**{**state.facts["result"], "events": events})
        if self.scaler:
            self.scaler.load_state_dict(state.facts["scaler"])
        self.best.load(state)

    def run(self, log: Callable[[dict[str, Any]], None], on_step: Callable[[Trainer], None] | None = None) -> Result:
        """Train to the end of the plan; the last evaluation's metrics are the result's.

        Args:
            log: called with each point of the learning curve.
            on_step: called after every optimiser step, when the state is whole.

        Raises:
            Diverged: a number that is not finite.
        """
        self.bare_model.train()  # transformers hands out loaded models in evaluation mode
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of the run before, in a sweep
        if self.step == 0:
            torch.manual_seed(self.settings.dropout_seed)
        log_every = math.ceil(self.plan.total_steps / CURVE_POINTS)
        with (
            progress_bar(self.plan.total_steps, shown=self.accelerator.is_main_process) as bar,
            first_token_alone(self.bare_model),
            self._prefetch.running(),
        ):
            for step, batches in self.best.until_exhausted(self._updates()):
                begin = time.perf_counter()
                with self.losses.noticing_divergence(step):
                    self._train_step(step, batches)
                self._before, self.step = self.step, step
                if self.passed(log_every) or self.passed(self.plan.eval_every) or self.losses.due:
                    self.losses.read()
                self.result.train_seconds += time.perf_counter() - begin
                if self.passed(log_every):
                    log({"step": step, "loss": self.losses.take_mean()})
                if self.passed(self.plan.eval_every):
                    with self.losses.noticing_divergence(step):
                        log(self._evaluate(step))
                if on_step is not None:
                    on_step(self)
                advance(bar, self.losses.values, self.result.metrics, self.task.primary_metric, self.method)
            if self.best.put_back(self.step, self.bare_model, self.method):
                self._score()
            self.result.events += self.best.events(self.step, self.plan.total_steps)
            self.result.memory |= {"saved": self._measure(saved_bytes)} | (self.prefix.facts() if self.prefix else {})
        return self.result

    def passed(self, every: int) -> bool:
        """Tell whether the update just taken reached or passed a multiple of `every` steps, or the end."""
        return self.step // every > self._before // every or self.step == self.plan.total_steps

    def _updates(self) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield the updates to come: the step that each completes, and its micro-batches.

        Once the effective batch has grown, an update takes the rows of several of the plan's steps, up to the end of the
        epoch, and the learning rate follows the plan as if each had been taken.
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
            self._upcoming = upcoming
            gathered += batches
            count += 1
            if count >= self.growth.steps or step % self.plan.steps_per_epoch == 0 or step == self.plan.total_steps:
                yield step, gathered
                gathered, count = [], 0

    def _train_step(self, step: int, batches: list[list[int]]) -> None:
        """Take one optimiser step; the mean loss over its rows stays on the device, unread."""
        self.optimizers.set_schedule(self.step, warmup=self.plan.warmup, total=self.plan.total_steps)
        self.losses.add(step, self._gradients(batches))
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
        grown = self.growth.observe(step, settled=self.method.settled(step), measure=lambda: self._measure(activation_bytes))
        self.result.events += [grown] if grown else []

    def _measure(self, measure: Callable[[nn.Module, dict[str, Tensor]], int]) -> int:
        """Measure a micro-batch of the longest training rows; nothing else is left behind."""
        self._note_peak()
        streams = random_streams()
        lengths = self.data.train.lengths
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])[: math.ceil(self.plan.batch_size / self.parts)]
        mine = share(longest, self.accelerator.process_index, self.accelerator.num_processes) or longest[:1]
        inputs = self._collate(self.data.train, mine)
        if self.prefix:
            self.prefix.prepare("train", self.data.train)
        with self._autocast(), self._replayed(mine, inputs):
            found = from_main(measure(self.bare_model, inputs))
        self.method.forget_backward()
        self.optimizers.zero_grad()
        set_random_streams(streams)
        return found

    def _note_peak(self) -> None:
        """Keep the peak of the GPU's memory in bytes: a measurement starts it again, and so does a resumed run."""
        if self.accelerator.device.type == "cuda":
            peak = int(torch.cuda.max_memory_allocated())
            self.result.memory["device"] = max(peak, self.result.memory.get("device", 0))

    def _replayed(self, rows: list[int], inputs: dict[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """Let the model go on from stored states in the block, where there are any."""
        return self.prefix.replay("train", rows, inputs) if self.prefix else contextlib.nullcontext()

    def _gradients(self, batches: list[list[int]]) -> Tensor:
        """Leave the gradients of a step's mean loss, and return it.

        Out of memory it is tried again, and the run goes on, with every micro-batch in twice as many parts, down to single
        rows: that keeps the rows of a step and so the effective batch. With several processes one alone cannot try again.
        """
        while True:
            streams = random_streams()
            counted = self.result.examples, self.result.tokens
            try:
                return self._accumulate(batches)
            except (MemoryError, RuntimeError) as error:
                if not ran_out_of_memory(error) or self.accelerator.num_processes > 1 or self.parts >= self.plan.batch_size:
                    raise
            self.optimizers.zero_grad()
            self.method.forget_backward()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            set_random_streams(streams)
            self.result.examples, self.result.tokens = counted
            self.parts *= 2
            rows = math.ceil(self.plan.batch_size / self.parts)
            self.result.events.append(Event(self.step + 1, "out_of_memory", {"rows_at_once": rows}))

    def _accumulate(self, batches: list[list[int]]) -> Tensor:
        """Run forward and backward over a step's micro-batches; gradients are those of the mean loss over all of them."""
        train = self.data.train
        whole = sum(train.loss_weights[row] for batch in batches for row in batch)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        total = torch.zeros((), device=self.accelerator.device)
        if self.prefix:
            self.prefix.prepare("train", train)
        pieces = self._pieces(batches)
        for index, piece in enumerate(pieces):
            mine = share(piece, rank, world)
            rows = mine or piece[:1]
            inputs = move(self._prefetch.take(rows), self.accelerator.device)
            last = index == len(pieces) - 1
            following = next(iter(self._pieces(self._upcoming) if last else pieces[index + 1 :]), [])
            self._prefetch.expect(share(following, rank, world) or following[:1])
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model), self._autocast():
                part = sum(train.loss_weights[row] for row in mine) / whole
                with self._replayed(rows, inputs):
                    loss = self.model(**inputs).loss.float() * part
                extra = self.method.extra_loss() if last else None
                # Data-parallel reduction averages over processes; the mean over all is a sum of shares.
                self._backward(loss * world if extra is None else loss * world + extra)
            total += loss.detach()
            self.result.examples += len(piece)
            self.result.tokens += sum(train.lengths[row] for row in piece)
        if self.settings.sharded:
            average_gradients(self.optimizers.parameters())
        if world > 1:
            total = self.accelerator.reduce(total, "sum")
        return total

    def _pieces(self, batches: list[list[int]]) -> list[list[int]]:
        """Return the rows of a step's micro-batches as they are computed: in larger ones or, out of memory, in parts."""
        grown = self.growth.regroup(batches, self.data.train.lengths) if batches else []
        return [batch[part :: self.parts] for batch in grown for part in range(min(self.parts, len(batch)))]

    def _unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Divide what the backward passes have left by the scaler's factor; where it has overflown, drop all of it.

        Without gradients the step changes no parameter, and the policy takes nothing in.
        """
        if self.optimizers.unscale(scaler):
            self.method.unscale_backward(scaler.get_scale())
        else:
            self.optimizers.zero_grad()
            self.method.forget_backward()

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(self.scaler.scale(loss) if self.scaler else loss)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = self.settings.autocast
        return torch.autocast(self.accelerator.device.type, dtype=dtype) if dtype else contextlib.nullcontext()

    def _restructure(self, events: list[Event]) -> None:
        """Take over a structural change: new optimiser groups, and the model is prepared again."""
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
        """Return the store of what the layers give that no longer change; the present one if they are still the same."""
        depth = frozen_depth(self.bare_model) if self.settings.prefix else 0
        if not self.settings.prefix or not depth:
            return None
        if self.prefix and self.prefix.prefix.depth == depth:
            return self.prefix
        return PrefixCache(Prefix(self.bare_model, depth), self.settings.prefix, self._collate)

    def _collate(self, features: Features, rows: list[int]) -> dict[str, Tensor]:
        """Return rows of features as the model's inputs, on its device."""
        return move(self.task.collate(features.rows(rows), self.tokenizer), self.accelerator.device)

    def _groups(self) -> list[ParameterGroup]:
        return [*self.method.groups(self.settings.lr), ParameterGroup(list(self.head), self.settings.head_lr)]

    def _prepare(self) -> nn.Module:
        """Wrap the model for several processes; with one there is nothing to wrap.

        Every wrapping hands the main process's parameters to all, so that what was drawn or decomposed is the same.
        """
        self.model = self.bare_model
        if self.accelerator.num_processes == 1 or self.settings.sharded:
            return self.model
        self.accelerator.free_memory()  # the wrapper of before, whose reducer keeps what has left the model
        wrapped: nn.Module = self.accelerator.prepare_model(self.bare_model)
        return wrapped

    def _evaluate(self, step: int) -> dict[str, Any]:
        """Evaluate the dev set; returns the point of the learning curve."""
        metrics = self._score()
        self.result.evaluations.append({"step": step, "seconds": self.result.train_seconds})
        self.best.observe(step, metrics, self.bare_model, self.method)
        return {"step": step, "epoch": step / self.plan.steps_per_epoch, "metrics": metrics}

    def _score(self) -> dict[str, float]:
        begin = time.perf_counter()
        with self._autocast():
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
