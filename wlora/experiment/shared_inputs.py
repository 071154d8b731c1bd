"""What the runs of one process have in common, loaded once and handed to each as if it were alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wlora.config.schema import Config
from wlora.console import notice
from wlora.data.sources import Splits, fingerprint, load_splits
from wlora.models.heads import head_parameters, name_classes, reorder_head, start_head
from wlora.models.loading import load_base, load_tokenizer
from wlora.models.source import ModelSource
from wlora.storage.content_hash import changed
from wlora.tasks.base import Task, build_task
from wlora.training.evaluation import Split
from wlora.training.settings import Data


@dataclass(frozen=True)
class Material:
    """A task's rows as a model's tokenizer encodes them; `unfit` is what a record says of rows that did not fit."""

    task: Task
    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    data: Data
    unfit: dict[str, Any]


class Stock:
    """The last task and the last base model of a process; a run that asks for the same gets them without loading.

    Nothing of one run reaches the next: each gets a model of its own, whose frozen parameters lie in the memory of the
    stock's until the run casts them to another dtype or device. If something has written into that memory all the same,
    the base is loaded again.

    Args:
        keep: false where only one run will ask: the base then is that run's, and there is no second one in memory.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._material: tuple[str, Material] | None = None
        self._base: tuple[str, PreTrainedModel, list[str], list[int]] | None = None

    def material(self, config: Config, source: ModelSource) -> Material:
        """Return the encoded rows of a task.

        Raises:
            ConfigError: rows or a tokenizer that cannot be read.
        """
        content = fingerprint(config.task)
        key = _key(config.task, content, config.model, source, config.offline)
        if self._material is None or self._material[0] != key:
            self._material = None  # before the next is loaded: two may not fit
            task = build_task(config.task)
            splits = load_splits(config.task, offline=config.offline)
            if content not in (None, splits.fingerprint):
                raise changed(f"task.path={config.task.path}")
            tokenizer = load_tokenizer(config.model, source)
            data, unfit = encode(task, splits, tokenizer)
            self._material = key, Material(task, splits, tokenizer, data, unfit)
        return self._material[1]

    def model(
        self,
        config: Config,
        source: ModelSource,
        material: Material,
        *,
        seed: int,
        own: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> PreTrainedModel:
        """Return a model in float32 with its head for the task, all parameters frozen.

        Args:
            seed: seed of the head's initialisation.
            own: the run changes the base's weights, so it needs them in memory of its own.
            device: as for `load_base`.
            dtype: as for `load_base`.
        """
        head, labels = material.task.head, material.task.num_labels
        key = _key(config.model, source, head, labels, config.offline)
        if self._base is None or self._base[0] != key or self._base[3] != _versions(self._base[1]):
            self._base = None
            base, fresh = load_base(
                config.model, source, material.tokenizer, head=head, num_labels=labels, device=device, dtype=dtype
            )
            if not self._keep or config.model.quantization != "none":  # packed weights cannot be shared
                return _with_head(base, fresh, config, seed, kind=head)
            self._base = key, base, fresh, _versions(base)
        return _with_head(_duplicate(self._base[1], own=own), self._base[2], config, seed, kind=head)


@functools.cache
def stock_of_process() -> Stock:
    """Return the stock that all runs of this process share."""
    return Stock()


def _with_head(model: PreTrainedModel, fresh: list[str], config: Config, seed: int, *, kind: str) -> PreTrainedModel:
    """Give a loaded model its head for a task: fresh or kept, its outputs in the order of the task's classes."""
    start_head(model, fresh, seed)
    if config.model.head == "kept" and kind == "sequence_classification":
        reorder_head(model, config.task.labels)
    name_classes(model, config.task.labels, head=kind)
    return model


def _duplicate(base: PreTrainedModel, *, own: bool) -> PreTrainedModel:
    """Return a model with its own modules, buffers, configuration and head, on the same frozen weights unless `own`."""
    if own:
        return copy.deepcopy(base)
    head = set(head_parameters(base).values())
    # Detached, not `.data`: so a write through either shows in the version of both.
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters() if p not in head}
    return copy.deepcopy(base, shared)  # type: ignore[arg-type]


def _versions(model: nn.Module) -> list[int]:
    """Return how often each parameter has been written to in place."""
    return [p._version for p in model.parameters()]


def encode(task: Task, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> tuple[Data, dict[str, Any]]:
    """Tokenise all splits, and say so where something did not fit.

    Returns:
        The features, and what the record says of the rows that did not fit: `truncated_share` by split, and
        `lost_answers` among the training rows.
    """
    features, shares, lost = {}, {}, 0
    for name, rows in splits.rows.items():
        found = features[name] = task.encode(rows, tokenizer, training=name == "train")
        shares[name] = found.truncated_share
        if found.truncated_share:
            notice(f"{found.truncated_share:.1%} of the rows of {name} are cut: see task.max_length")
        if name == "train" and found.lost_answers:
            lost = found.lost_answers
            notice(f"{lost} of {len(rows)} rows of {name} have their answer whole in no window: see task.stride")
    train = features.pop("train")
    validation = {name: Split(splits.rows[name], encoded) for name, encoded in features.items()}
    return Data(train=train, validation=validation), {"truncated_share": shares, "lost_answers": lost}


def _key(*parts: Any) -> str:
    plain = [
        dataclasses.asdict(part) if dataclasses.is_dataclass(part) and not isinstance(part, type) else part for part in parts
    ]
    return json.dumps(plain, sort_keys=True, default=str)
