"""Data and base models shared by the runs of one process. They are loaded once; runs remain isolated from each other."""

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
from wlora.data.row_checks import ANSWERS
from wlora.data.sources import Splits, fingerprint, load_splits
from wlora.errors import wrong_value
from wlora.models.architectures import NAMED_HEADS
from wlora.models.heads import head_parameters, name_classes, reorder_head, start_head, weigh_classes
from wlora.models.loading import load_base
from wlora.models.source import ModelSource
from wlora.models.tokenizer import load_tokenizer, separates_pairs
from wlora.storage.content_hash import changed
from wlora.tasks.base import Task, build_task
from wlora.training.evaluation import Split
from wlora.training.settings import Data


@dataclass(frozen=True)
class Material:
    """The encoded data of a task for one tokenizer. `unfit` is the record's information about rows that did not fit."""

    task: Task
    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    data: Data
    unfit: dict[str, Any]


class SharedInputs:
    """Cache of the last task and the last base model of a process. A run with the same task or model need not load it again.

    Runs are isolated: each gets its own model, which shares the memory of the frozen weights with the cache until the run
    casts or moves them. If the shared weights were modified nevertheless, the base is loaded again.

    Args:
        keep: whether to keep the base for later runs. If false, the run gets the base itself and memory holds one copy only.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._material: tuple[str, Material] | None = None
        self._base: tuple[str, PreTrainedModel, list[str], list[int]] | None = None

    def material(self, config: Config, source: ModelSource) -> Material:
        """Return the encoded data of a task.

        Raises:
            ConfigError: the data or the tokenizer cannot be read.
        """
        content = fingerprint(config.task)
        key = _key(config.task, content, config.model, source, config.offline)
        if self._material is None or self._material[0] != key:
            self._material = None  # free the memory before loading, because two data sets may not fit
            task = build_task(config.task)
            splits = load_splits(config.task, offline=config.offline)
            if content not in (None, splits.fingerprint):
                raise changed(f"task.path={config.task.path}")
            tokenizer = load_tokenizer(config.model, source)
            if task.head == "sequence_classification" and len(config.task.columns) > 1 and not separates_pairs(tokenizer):
                notice("the tokenizer puts nothing between two texts: model.separate_pairs=true puts its end token there")
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
            own: whether the run modifies the base's weights and therefore needs its own copy.
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
            if not self._keep or config.model.quantization != "none":  # quantised weights cannot be shared
                return _with_head(base, fresh, config, material, seed)
            self._base = key, base, fresh, _versions(base)
        return _with_head(_duplicate(self._base[1], own=own), self._base[2], config, material, seed)


@functools.cache
def inputs_of_process() -> SharedInputs:
    """Return the cache that all runs of this process share."""
    return SharedInputs()


def _with_head(model: PreTrainedModel, fresh: list[str], config: Config, material: Material, seed: int) -> PreTrainedModel:
    """Initialise the head of a loaded model for a task (fresh or kept), with outputs in the order of the task's classes."""
    kind = material.task.head
    start_head(model, fresh, seed)
    if config.model.head == "kept" and kind in NAMED_HEADS:
        reorder_head(model, config.task.labels)
    name_classes(model, config.task.labels, head=kind, several=config.task.kind == "multi_label")
    weights = getattr(material.task, "class_weights", None)
    if weights is not None:
        weigh_classes(model, weights)
    return model


def _duplicate(base: PreTrainedModel, *, own: bool) -> PreTrainedModel:
    """Copy a model. Modules, buffers, configuration and head are copied; frozen weights are shared unless `own`."""
    if own:
        return copy.deepcopy(base)
    head = set(head_parameters(base).values())
    # `detach()` shares the version counter, so that writes through either tensor are detected; `.data` would not.
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters() if p not in head}
    return copy.deepcopy(base, shared)  # type: ignore[arg-type]


def _versions(model: nn.Module) -> list[int]:
    """Return the version counter of each parameter: the number of in-place modifications."""
    return [p._version for p in model.parameters()]


def encode(task: Task, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> tuple[Data, dict[str, Any]]:
    """Tokenise all splits, and print a notice if rows are truncated or left out, or answers are lost.

    Returns:
        The features, and information for the record: `truncated_share` by split; `lost_answers`, the number of training rows
        whose answer is completely contained in no window; and, if there are any, `left_out`, the number of training rows
        without features, and `empty_texts` by split and column.
    """
    features, shares, lost, left_out = {}, {}, 0, 0
    for name, found_empty in splits.empty.items():
        told = ", ".join(f"{number} in column {column}" for column, number in found_empty.items())
        notice(f"empty texts among the {len(splits.rows[name])} rows of {name}: {told}")
    for name, rows in splits.rows.items():
        found = features[name] = task.encode(rows, tokenizer, training=name == "train")
        shares[name] = found.truncated_share
        if found.truncated_share:
            notice(f"{found.truncated_share:.1%} of the rows of {name} are truncated: see task.max_length")
        if name == "train" and (left_out := max(len(rows) - len(found), 0)):
            notice(f"{left_out} of {len(rows)} rows of {name} are left out, because the tokenizer finds no token in them")
        if name == "train" and found.lost_answers:
            lost = found.lost_answers
            notice(f"{lost} of {len(rows)} rows of {name} have an answer that fits in no window: see task.stride")
    train = features.pop("train")
    validation = {name: Split(splits.rows[name], encoded) for name, encoded in features.items()}
    unfit: dict[str, Any] = {"truncated_share": shares, "lost_answers": lost}
    unfit |= {"left_out": left_out} if left_out else {}
    return Data(train=train, validation=validation), unfit | ({"empty_texts": splits.empty} if splits.empty else {})


def require_best(config: Config, splits: Splits) -> None:
    """Check that the validation rows have the questions that `train.best=HasAns_…` or `NoAns_…` is computed over.

    Raises:
        ConfigError: no question has an answer, or each has one.
    """
    best, split = config.train.best or "", config.task.validation[0]
    if best.startswith(("HasAns_", "NoAns_")):
        answered = best.startswith("HasAns_")
        if all(bool(answer["text"]) != answered for answer in splits.rows[split][ANSWERS][:]):
            which = "no question has an answer" if answered else "every question has an answer"
            raise wrong_value("train.best", best, f"a metric that exists for {split}, where {which}, such as f1")


def _key(*parts: Any) -> str:
    plain = [
        dataclasses.asdict(part) if dataclasses.is_dataclass(part) and not isinstance(part, type) else part for part in parts
    ]
    return json.dumps(plain, sort_keys=True, default=str)
