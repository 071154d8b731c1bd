"""`Handle`, the result of `wlora.attach`: one training with one method, controlled by your own loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wlora.adapters.adapter_set import count_elements
from wlora.errors import ConfigError, RunFault, wrong_value
from wlora.experiment.build import Assembly
from wlora.experiment.saving import save_adapter
from wlora.methods.base import Event, Method, Steps
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.training_data import Batch, Phase, TrainingData
from wlora.training.optimizers import Optimizers
from wlora.training.prefetch import move
from wlora.training.state import State, capture, restore

Rows = Sequence[Mapping[str, Any]]
"""Encoded training rows, such as a `datasets.Dataset`: each a mapping with `input_ids` and, if it has one, `labels`."""
Collate = Callable[[list[Any]], Mapping[str, Tensor]]
"""Turns rows into a batch of the model's inputs, such as `transformers.DataCollatorWithPadding(tokenizer)`."""

_KINDS = {
    "ForSequenceClassification": "sequence_classification",
    "ForQuestionAnswering": "question_answering",
    "ForConditionalGeneration": "seq2seq",
    "ForTokenClassification": "token_classification",
}


class Handle:
    """One training of a model with a method's adapters.

    A plain loop calls `begin` once, and `step` after the backward pass of every optimiser step. With transformers' Trainer,
    `WLoRACallback` makes both calls. The updates are the same as in a run: AdamW for adapters and head, plain SGD without
    schedule and clipping for ω (WeightLoRA, section 3.3), and new optimiser groups after every cut or growth.

    Attributes:
        model: the model with adapters.
        name: the name of the method.
        method: the method, which controls the adapters.
        done: optimiser steps taken.
        events: the structural changes so far, such as the cut.
        phases: the training rows that the method requests for each part of the training; known after `begin`, and empty
            for a method that does not look at rows.
    """

    def __init__(self, assembly: Assembly, name: str, length: Steps | None) -> None:
        self.model: PreTrainedModel = assembly.model
        self.name, self.done = name, 0
        self.events: list[Event] = []
        self.phases: list[Phase] = []
        self.method = assembly.method
        self._assembly = assembly
        self._counts = assembly.count_parameters()
        self._length = length
        self._optimizers: Optimizers | None = None

    def begin(
        self,
        steps: int,
        *,
        lr: float,
        head_lr: float | None = None,
        warmup: int = 0,
        steps_per_epoch: int | None = None,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 1.0,
        rows: Rows | None = None,
        collate: Collate | None = None,
    ) -> None:
        """Plan the method's schedule and build the optimisers. Call this once, before the first `step`.

        Args:
            steps: optimiser steps of the whole training.
            lr: peak learning rate of the adapters; it rises over `warmup` steps and then falls to 0.
            head_lr: peak learning rate of head and pooler; None means `lr`.
            warmup: steps of the linear warm-up.
            steps_per_epoch: optimiser steps of one pass over the data; the selection takes at most one pass. None means
                `steps`.
            weight_decay: decoupled weight decay of AdamW.
            max_grad_norm: maximum global norm of all gradients except those of ω; None or 0 for no clipping.
            rows: training rows, for methods that use them (`lora_drop`, `alora`, `flexora`, `flexlora`, `single`).
            collate: converts rows to a batch; required with `rows`.

        Raises:
            ConfigError: the method does not fit a training of this length, or needs rows.
        """
        if self._optimizers is not None:
            raise ConfigError("begin: the training has begun already: allowed is one training for each wlora.attach")
        length = Steps(steps, steps_per_epoch or steps)
        if self._length is None:
            self.method.plan(length)
        elif self._length != length:
            told = (f"steps={part.total}, steps_per_epoch={part.per_epoch}" for part in (length, self._length))
            raise ConfigError("begin: {}: allowed is {}, as for wlora.attach".format(*told))
        self._length, self._warmup, self._max_grad_norm = length, warmup, max_grad_norm
        self._lr, self._head_lr = lr, head_lr or lr
        if type(self.method).phases is not Method.phases:  # other methods never look at rows, which may be of any form
            if rows is not None and collate is not None:
                self.phases = self.method.phases(_training_data(self.model, rows, collate), steps)
            else:
                raise ConfigError(
                    f"method={self.name}: looks at training rows: allowed is begin(..., rows=ROWS, collate=FUNCTION)"
                )
        self._optimizers = Optimizers(self.groups(), weight_decay=weight_decay, release=self.method.release_adamw)

    def step(self, factor: float | None = None) -> list[Event]:
        """Take one optimiser step with the current gradients, and call the method before and after it.

        Gradients are clipped before the step and freed after it.

        Args:
            factor: the learning rate as a share of its peak; None means linear warm-up and decay.

        Returns:
            The structural changes: a cut, or growth.

        Raises:
            ConfigError: the training has not begun, or T is so short that ω has received no gradient.
            RunFault: a number of an event is not finite.
        """
        optimizers, length = self._begun()
        if (extra := self.method.extra_loss()) is not None:
            extra.backward()  # type: ignore[no-untyped-call]
        if factor is None:
            optimizers.set_schedule(self.done, warmup=self._warmup, total=length.total)
        else:
            optimizers.scale(factor)
        if self._max_grad_norm:
            optimizers.clip(self._max_grad_norm)
        changes = self._restructure(self.method.before_step(self.done + 1))
        optimizers.step()
        changes += self._restructure(self.method.after_step(self.done + 1))
        optimizers.zero_grad()
        self.done += 1
        return changes

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters that are currently trained: adapters, ω and head."""
        return [p for group in self.groups() for p in group.parameters if p.requires_grad]

    def groups(self) -> list[ParameterGroup]:
        """Return the current optimiser groups. ω has a separate group with `rule="sgd"`."""
        if self._length is None:
            raise ConfigError("groups: the training has not begun: call begin(steps, lr=...) first")
        return [*self.method.groups(self._lr), ParameterGroup(list(self._assembly.head.values()), self._head_lr)]

    def settled(self) -> bool | None:
        """Return whether the method's last cut is done; None for a method without one."""
        return None if type(self.method).settled is Method.settled else self.method.settled(self.done)

    def check_settled(self) -> None:
        """Check that the method has made its cut.

        Raises:
            RunFault: the training ended before the cut; all adapters are still connected.
        """
        if self.settled() is False:
            planned = f" of {self._length.total}" if self._length else ""
            raise RunFault(
                f"method={self.name}: the cut was never made: {self.done} optimiser steps{planned} are done, and "
                f"T={getattr(self.method, 'select_steps', None)}\nway out: begin(steps=...) with the actual number of "
                "steps, and step() after every backward pass"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the training: adapters, head, method, optimisers and torch's random generators.

        The values are tensors and plain Python objects, so `torch.load(..., weights_only=True)` can read them.
        """
        optimizers, _ = self._begun()
        state = capture(self.model, self.method, optimizers)
        facts = state.facts | {"method_name": self.name, "done": self.done}
        facts["events"] = [dataclasses.asdict(event) for event in self.events]
        return {"facts": facts, "tensors": {name: tensor.detach().clone() for name, tensor in state.tensors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same training. Call `begin` with the same values first.

        Raises:
            ConfigError: the state belongs to another method or model.
        """
        optimizers, _ = self._begun()
        facts, tensors = state["facts"], state["tensors"]
        if facts["method_name"] != self.name:
            raise wrong_value("load_state_dict", f"a state of method={facts['method_name']}", f"one of method={self.name}")
        try:
            restore(State(facts, dict(tensors)), self.model, self.method, optimizers, self.groups)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"load_state_dict: the state belongs to another model or other adapters ({error})") from error
        self.done, self.events = facts["done"], [Event(**event) for event in facts["events"]]

    def summary(self) -> dict[str, Any]:
        """Return the active adapters (ω and rank by module name), the parameter counts, and the events so far."""
        kept = self.method.kept()
        acting = {
            n: {"omega": None if a.omega is None else float(a.omega.detach()), "rank": a.rank} for n, a in kept.items()
        }
        counts = self._counts | {"adapter_final": count_elements(kept.values())}
        return {"method": self.name, "steps": self.done, "adapters": acting, "parameters": counts, "events": self.events}

    def export(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, compact: bool = False) -> Path:
        """Write adapters and head as a folder for `PeftModel.from_pretrained(base, folder)`; replaces an older one.

        Args:
            folder: the folder.
            tokenizer: a tokenizer to save in the same folder.
            compact: every adapter keeps its own rank and alpha (`rank_pattern`, `alpha_pattern`); otherwise ranks are
                padded to the largest, and alpha / rank is 1.

        Raises:
            ConfigError: the method has no adapters, or none is left.
            RunFault: the cut was never made, or the folder cannot be written.
        """
        self.check_settled()
        kind = next((kind for end, kind in _KINDS.items() if type(self.model).__name__.endswith(end)), None)
        if not save_adapter(self.model, self.method, Path(folder), kind=kind, compact=compact):
            raise ConfigError(f"export: method={self.name} has no adapters, or none is left: allowed is a method with some")
        self.model.config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return Path(folder)

    def merge(self) -> PreTrainedModel:
        """Merge every adapter into its base weight and return the model, now a plain one. The training ends.

        Raises:
            RunFault: the cut was never made.
        """
        self.check_settled()
        self.method.fold()
        return self.model

    def _begun(self) -> tuple[Optimizers, Steps]:
        if self._optimizers is None or self._length is None:
            raise ConfigError(
                "the training has not begun: call begin(steps, lr=...) first, or train with WLoRACallback(handle)"
            )
        return self._optimizers, self._length

    def _restructure(self, events: list[Event]) -> list[Event]:
        """Apply a structural change: rebuild the optimiser groups."""
        optimizers, _ = self._begun()
        for event in events:
            if not event.finite:
                raise RunFault(
                    f"the numbers of event {event.kind} at step {event.step} are not finite: the training diverged"
                )
        if any(event.reset for event in events):
            optimizers.forget()
        if events:
            optimizers.rebuild(self.groups())
        self.events += events
        return events


def _training_data(model: PreTrainedModel, rows: Rows, collate: Collate) -> TrainingData:
    """Return access to batches of training rows on the model's device, for methods."""
    if not hasattr(rows, "__len__"):
        raise wrong_value("rows", type(rows).__name__, "rows with a length, which can be read in any order")
    lengths, labels = list[int](), list[Any]()
    for index in range(len(rows)):  # only rows with a length are sure to end
        row = rows[index]
        if not isinstance(row, Mapping) or "input_ids" not in row:
            found = f"with {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise ConfigError(f"rows: row {index} is {found}: allowed are encoded rows, mappings with input_ids and labels")
        lengths.append(len(row["input_ids"]))
        labels.append(row.get("labels", row.get("label")))
    plain = all(isinstance(label, int | float) for label in labels)

    def batch(chosen: Sequence[int]) -> Batch:
        device = next(model.parameters()).device
        return move({key: torch.as_tensor(value) for key, value in collate([rows[row] for row in chosen]).items()}, device)

    return TrainingData(model, lengths=lengths, labels=[float(x) for x in labels] if plain else None, collate=batch)
