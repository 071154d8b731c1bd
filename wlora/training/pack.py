"""Packed training: one forward and backward pass over the rows of several runs that share a frozen base.

Each run keeps its own trainer, method, adapters, head, optimisers, schedule and record. Only the forward and backward passes
are shared. The carrier, a copy of the model without adapters, computes the base once over the rows of all runs. At every
adapted module, it adds the output of each run's adapter to that run's rows. At the head, it applies each run's own modules
to that run's rows. When a run cuts or grows its adapters, the carrier looks them up again.

With dropout off, a run's numbers equal those of the same run alone up to rounding. Dropout masks are keyed
(`wlora.models.keyed_dropout`): they depend on the run's seed and step, not on the other runs of the pack.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wlora.adapters.layer import LowRankAdapter
from wlora.adapters.stacked import Stacks, add_adapters, apply_linears
from wlora.errors import ran_out_of_memory
from wlora.models.fast_dropout import quicken_dropout
from wlora.models.first_token import first_token_alone
from wlora.models.heads import head_modules
from wlora.models.keyed_dropout import KeyedDropout, make_key
from wlora.training.activation_memory import activation_bytes
from wlora.training.gradients import discard
from wlora.training.passes import Piece, plan_passes
from wlora.training.prefetch import move
from wlora.training.settings import Computed
from wlora.training.trainer import Trainer

# The share of the free memory that a pack may use.
MEMORY_SHARE = 0.7
# On a CPU, larger packs were not faster in measurements.
MOST_ON_CPU = 8

Request = tuple[Trainer, list[list[int]]]
"""A run and the micro-batches of its next optimiser step."""


@dataclass
class Member:
    """A run in a pack.

    Attributes:
        heads: the head's modules that have parameters, by name.
        adapters: the run's adapters, by module name.
        seen: number of structural changes that `adapters` includes.
    """

    trainer: Trainer
    heads: dict[str, nn.Module]
    adapters: dict[str, LowRankAdapter]
    seen: int = -1

    def refresh(self) -> None:
        """Look up the adapters again, but only if the structure has changed, because the search takes time."""
        changes = len(self.trainer.result.events)
        if changes != self.seen:
            self.adapters, self.seen = dict(self.trainer.method.adapters), changes

    @property
    def lowest(self) -> int | None:
        """Index of the lowest layer with an adapter; None without adapters."""
        return self.trainer.method.adapters.lowest_layer


@dataclass
class _Pass:
    """One forward pass: its runs, their dropout and stacked parameters, and the number of calls of each module."""

    members: list[Member]
    dropout: KeyedDropout
    stacks: Stacks = field(default_factory=Stacks)
    calls: Counter[str] = field(default_factory=Counter)


class Pack:
    """Runs that train together. They have the same model, precision, task and data. `join` adds a run.

    Args:
        first: the first run; the carrier is built from its model.
    """

    def __init__(self, first: Trainer) -> None:
        self.task, self.tokenizer, self.features = first.task, first.tokenizer, first.data.train
        self.device = first.accelerator.device
        self.most_rows: int | None = None  # maximum rows per pass; None for no limit
        self._members: dict[int, Member] = {}
        self._pass: _Pass
        self.carrier = _strip(first.bare_model).train()
        quicken_dropout(self.carrier, fast=False)  # masks are keyed
        self._depth = int(self.carrier.config.num_hidden_layers)
        self._patched: set[str] = set()
        for name in _with_parameters(self.carrier):
            self._patch(name, self._apply_own)
        self._dtype = next(p.dtype for p in first.head) if first.head else torch.float32
        self._open = ExitStack()  # contexts that stay open as long as the pack exists
        self._open.enter_context(first_token_alone(self.carrier))
        self.join(first)

    @cached_property
    def capacity(self) -> int:
        """The number of runs that fit into memory, estimated from the first one; on a CPU at most `MOST_ON_CPU`."""
        needed = max(1, next(iter(self._members.values())).trainer.measure(activation_bytes))
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return max(1, int(MEMORY_SHARE * (torch.cuda.mem_get_info(self.device)[0] + cached) / needed))
        return max(1, min(MOST_ON_CPU, int(MEMORY_SHARE * psutil.virtual_memory().available / needed)))

    def join(self, trainer: Trainer) -> None:
        """Add a run. Its frozen weights are replaced by the carrier's, so that they are in memory once."""
        shared = dict(self.carrier.named_parameters())
        for name, parameter in trainer.bare_model.named_parameters():
            own = shared.get(name.replace(".base.", "."))
            if own is not None and not parameter.requires_grad and not own.requires_grad:
                parameter.data = own.data
        heads = {name: trainer.bare_model.get_submodule(name) for name in _with_parameters(self.carrier)}
        trainer.keyed = True
        self._members[id(trainer)] = Member(trainer, heads, {})
        for name in trainer.method.adapters:
            if name not in self._patched:
                self._patch(name, self._apply_adapted)

    def leave(self, trainer: Trainer) -> None:
        """Remove a run that has ended."""
        self._members.pop(id(trainer), None)

    def compute(self, requests: Sequence[Request]) -> list[Computed]:
        """Store the gradients of each run's mean loss in its parameters, and return the losses.

        If memory is exhausted, the step is repeated with half as many rows per pass, down to one row of one run.
        """
        begin = time.perf_counter()
        members = [self._members[id(trainer)] for trainer, _ in requests]
        for member in members:
            member.refresh()
        while True:
            counted = [(m.trainer.result.examples, m.trainer.result.tokens) for m in members]
            try:
                losses = self._accumulate(members, [batches for _, batches in requests])
                break
            except (MemoryError, RuntimeError) as error:
                if not ran_out_of_memory(error) or self.most_rows == 1:
                    raise
            for member, (examples, tokens) in zip(members, counted, strict=True):
                discard(member.trainer)
                member.trainer.result.examples, member.trainer.result.tokens = examples, tokens
            self.most_rows = max(1, (self.most_rows or sum(len(batches[0]) for _, batches in requests)) // 2)
        seconds = (time.perf_counter() - begin) / len(members)
        return [Computed(loss, seconds) for loss in losses]

    def _accumulate(self, members: list[Member], requests: list[list[list[int]]]) -> list[Tensor]:
        """Run forward and backward over the micro-batches of one step of all runs; return the losses."""
        weights, lengths = self.features.loss_weights, self.features.lengths
        whole = [sum(weights[row] for batch in batches for row in batch) for batches in requests]
        totals = [torch.zeros((), device=self.device) for _ in members]
        for micro in range(max(map(len, requests))):
            pieces = [
                Piece(index, batches[micro], max(lengths[row] for row in batches[micro]), member.lowest)
                for index, (member, batches) in enumerate(zip(members, requests, strict=True))
                if micro < len(batches)
            ]
            for group in plan_passes(
                pieces, layers=self._depth, device=self.device.type, most_rows=self.most_rows, padded=self.task.any_padding
            ):
                found = self._run_pass([members[piece.run] for piece in group], group, whole, micro)
                for piece, loss in zip(group, found, strict=True):
                    totals[piece.run] = totals[piece.run] + loss
                    members[piece.run].trainer.count(piece.rows)
        return totals

    def _run_pass(self, members: list[Member], pieces: list[Piece], whole: list[int], micro: int) -> Sequence[Tensor]:
        """Run forward and backward over one micro-batch of each run; return their shares of the runs' losses."""
        rows = max(len(piece.rows) for piece in pieces)
        weights = self.features.loss_weights
        # A run with fewer rows is padded with copies of its first row, with weight 0.
        filled = [[*piece.rows, *[piece.rows[0]] * (rows - len(piece.rows))] for piece in pieces]
        shares = [
            [*(weights[row] / whole[piece.run] for row in piece.rows), *[0.0] * (rows - len(piece.rows))] for piece in pieces
        ]
        batch = self.task.collate(self.features.rows([row for block in filled for row in block]), self.tokenizer)
        inputs = move(batch | {"shares": torch.tensor(shares, dtype=self._dtype)}, self.device)
        keys = [
            make_key(member.trainer.settings.dropout_seed, member.trainer.step + 1, micro, piece.part)
            for member, piece in zip(members, pieces, strict=True)
        ]
        weighting = inputs.pop("shares")
        with KeyedDropout(keys, rows, self.device) as dropout:
            self._pass = _Pass(members, dropout)
            losses = self.task.row_losses(self.carrier, inputs).view(len(members), rows)
        each = (losses.to(self._dtype) * weighting).sum(1)
        scalers = [member.trainer.scaler for member in members]
        if any(scalers):
            scaled = [scaler.scale(loss) if scaler else loss for scaler, loss in zip(scalers, each, strict=True)]
            torch.autograd.backward(torch.stack(scaled).sum())
        else:
            torch.autograd.backward(each.sum())
        self._pass.stacks.divide()
        return each.detach().unbind()

    def _patch(self, name: str, forward: Any) -> None:
        """Replace the forward function of a module of the carrier by one that uses the runs' own modules."""
        module = self.carrier.get_submodule(name)
        module.forward = partial(forward, name, module.forward)
        self._patched.add(name)

    def _apply_adapted(self, name: str, base: Any, x: Tensor) -> Tensor:
        """Apply a base module to all rows, and each run's adapter to the rows of that run."""
        now = self._pass
        adapters = [member.adapters.get(name) for member in now.members]
        now.calls[name] += 1  # a pass may call a module several times, as in ALBERT's shared layers
        place = f"{name}/{now.calls[name]}"

        def drop(rows: Tensor, p: float, index: Tensor | None) -> Tensor:
            return now.dropout.drop(rows, p, place, index)

        return add_adapters(base(x), x, adapters, drop, now.stacks)

    def _apply_own(self, name: str, base: Any, x: Tensor) -> Tensor:
        """Apply each run's own module of the head to the rows of that run."""
        modules = [member.heads[name] for member in self._pass.members]
        linears = [module for module in modules if isinstance(module, nn.Linear)]
        if len(linears) == len(modules):
            return apply_linears(x, linears, self._pass.stacks)
        blocks = x.view(len(modules), -1, *x.shape[1:]).unbind()
        return torch.cat([module(block) for module, block in zip(modules, blocks, strict=True)])


def _strip(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model without its adapters. The copy shares the parameters."""
    carrier: PreTrainedModel = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for name, module in list(carrier.named_modules()):
        if getattr(module, "adapts", False):
            parent, _, child = name.rpartition(".")
            setattr(carrier.get_submodule(parent), child, module.base)
    return carrier


def _with_parameters(model: nn.Module) -> list[str]:
    """Return the names of the modules of head and pooler that have parameters of their own."""
    found = []
    for prefix, module in head_modules(model).items():
        for name, part in module.named_modules(prefix=prefix):
            if any(True for _ in part.parameters(recurse=False)):
                found.append(name)
    return found
