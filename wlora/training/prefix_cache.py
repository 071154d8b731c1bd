"""Cache of the frozen prefix: its hidden states are computed once per row and stored, in memory or on disk.

    <results_dir>/prefix_cache/<fingerprint>/   states.bin (hidden states, row after row)   manifest.json

A folder is written atomically and accepted only if its checksum matches. Later runs with the same prefix weights, data,
depth and dtype reuse it. It may be deleted at any time: a run keeps the file that it has mapped, and the next run computes
the states again in one pass over the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import __version__ as transformers_version

from wlora.config.schema import Config
from wlora.console import notice, say
from wlora.data.features import INPUT_TYPES, Features
from wlora.errors import RunFault
from wlora.models.prefix_forward import Prefix
from wlora.reading import open_file, read_file, read_json
from wlora.storage.atomic_write import MISSING, patiently, put, remove_path, staged
from wlora.storage.content_hash import hash_stream
from wlora.training.batch_order import evaluation_batches
from wlora.training.prefetch import move

SCHEMA = 1
_STATES, _MANIFEST = "states.bin", "manifest.json"
# Rows that are computed together. The groups are fixed, so that a row's states do not depend on when they are first
# needed.
ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Storage:
    """How hidden states are stored.

    Attributes:
        kind: `memory`, or `disk` for memory-mapped files.
        dtype: dtype of the stored states.
        limit: maximum number of bytes, over all splits of a run; rows that do not fit are recomputed every time.
        folder: folder of the files.
    """

    kind: Literal["memory", "disk"]
    dtype: torch.dtype
    limit: int
    folder: Path


def storage_of(config: Config) -> Storage | None:
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


@dataclass(frozen=True)
class _Stored:
    """Hidden states of a split. Those of a row are `states[start:start + length]`; start is -1 for rows that did not fit."""

    states: Tensor
    starts: np.ndarray
    lengths: np.ndarray


class PrefixCache:
    """The hidden states after a frozen prefix, for the rows of a run's splits.

    Args:
        prefix: the frozen layers.
        storage: how states are stored.
        collate: turns features and row indices into the model's inputs, on the model's device.
    """

    def __init__(
        self, prefix: Prefix, storage: Storage, collate: Callable[[Features, list[int]], dict[str, Tensor]]
    ) -> None:
        self.prefix, self.storage, self._collate = prefix, storage, collate
        self._splits: dict[str, _Stored] = {}
        self._model: str | None = None

    def facts(self) -> dict[str, int]:
        """Return the facts for the record: number of skipped layers, stored rows and bytes."""
        stored = self._splits.values()
        return {
            "prefix_layers": self.prefix.depth,
            "prefix_rows": sum(int((split.starts >= 0).sum()) for split in stored),
            "prefix_bytes": sum(split.states.nbytes for split in stored),
        }

    def prepare(self, split: str, features: Features) -> None:
        """Compute or load the states of a split, unless that is done.

        Raises:
            RunFault: the disk is full, or the folder cannot be written.
        """
        if split in self._splits:
            return
        lengths = np.asarray(features.lengths)
        order = [row for batch in evaluation_batches(features.lengths, ROWS_AT_ONCE) for row in batch]
        token = self.prefix.width * self.storage.dtype.itemsize
        left = self.storage.limit - sum(stored.states.nbytes for stored in self._splits.values())
        kept = order[: int(np.searchsorted(np.cumsum(lengths[order]) * token, left, side="right"))]
        starts = np.full(len(features), -1, dtype=np.int64)
        starts[kept] = np.cumsum(lengths[kept]) - lengths[kept]
        if len(kept) < len(order):
            notice(f"train.prefix_cache_gb holds {len(kept)} of {len(order)} rows of {split}; the other rows are recomputed")
        tokens = int(lengths[kept].sum())
        if self.storage.kind == "disk" and tokens:
            states = self._open(features, kept, tokens)
        else:
            states = torch.empty(tokens, self.prefix.width, dtype=self.storage.dtype)
            end = 0
            for piece in self._compute(features, kept):
                states[end : end + len(piece)] = piece
                end += len(piece)
        self._splits[split] = _Stored(states, starts, lengths)

    def replay(self, split: str, rows: list[int], inputs: dict[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """Within the returned context, the model continues from the states of these rows. Arguments as for `find`."""
        return self.prefix.replaced(self.find(split, rows, inputs))

    def find(self, split: str, rows: list[int], inputs: dict[str, Tensor]) -> Tensor:
        """Return the stored states of these rows, [rows, tokens, width], on the model's device. Call `prepare` first.

        Args:
            split: the name of the split.
            rows: row indices.
            inputs: the collated rows; the attention mask gives the positions of the states in [rows, tokens].
        """
        stored = self._splits[split]
        if (stored.starts[rows] < 0).any():
            # Rounded like the stored states, so that results do not depend on the memory limit.
            return self.prefix.compute(inputs).to(self.storage.dtype)
        mask = inputs["attention_mask"].bool()
        spans = zip(stored.starts[rows].tolist(), stored.lengths[rows].tolist(), strict=True)
        pieces = [stored.states[start : start + length] for start, length in spans]
        tokens = move({"states": torch.cat(pieces)}, mask.device)["states"]
        # Each token takes the next stored state. `states[mask] = tokens` would synchronise with the GPU.
        place = mask.flatten().cumsum(0).sub(1).clamp(min=0)
        return tokens[place].view(*mask.shape, -1).masked_fill(~mask.unsqueeze(-1), 0)

    def _compute(self, features: Features, rows: list[int]) -> Iterator[Tensor]:
        """Yield the states of rows batch by batch, [tokens, width], without padding."""
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            inputs = self._collate(features, rows[begin : begin + ROWS_AT_ONCE])
            states = self.prefix.compute(inputs)
            yield states[inputs["attention_mask"].bool()].to(self.storage.dtype).cpu()

    def _open(self, features: Features, rows: list[int], tokens: int) -> Tensor:
        """Map the file of these states. If there is no intact file, write it first."""
        folder = self.storage.folder / self._fingerprint(features, rows)
        size = tokens * self.prefix.width * self.storage.dtype.itemsize
        mapped = _find(folder, size)
        if mapped is None:
            mapped = self._write(folder, features, rows)
        else:
            say(f"prefix     using the stored states in {folder}")
        return torch.frombuffer(mapped, dtype=self.storage.dtype).view(tokens, self.prefix.width)

    def _write(self, folder: Path, features: Features, rows: list[int]) -> mmap.mmap:
        """Write the states and map the file. It is kept for later runs, unless another run was faster or writing fails."""
        digest = hashlib.sha256()
        try:
            with staged(folder) as staging:
                staging.mkdir()
                with (staging / _STATES).open("w+b") as stream:
                    for piece in self._compute(features, rows):
                        content = piece.contiguous().view(torch.uint8).numpy().tobytes()
                        digest.update(content)
                        stream.write(content)
                    stream.flush()
                    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)  # stays valid if the folder is removed
                with contextlib.suppress(OSError):
                    (staging / _MANIFEST).write_text(json.dumps({"schema": SCHEMA, "sha256": digest.hexdigest()}))
                    if not os.path.lexists(folder):
                        put(staging, folder)
                return mapped
        except OSError as error:
            raise RunFault(
                f"the prefix cache {folder} cannot be written ({error.strerror}): train.prefix_cache=memory needs no disk"
            ) from error

    def _fingerprint(self, features: Features, rows: list[int]) -> str:
        """Return 16 hex digits of a hash of everything that determines the states of these rows."""
        if self._model is None:
            self._model = self.prefix.fingerprint()
        versions = f"{torch.__version__} {transformers_version} {self.storage.dtype} {len(rows)}"
        digest = hashlib.sha256(f"{SCHEMA} {self._model} {versions}".encode())
        for key in INPUT_TYPES:
            if key in features.table.column_names:
                digest.update(features.array(key).flatten().to_numpy().data)
        digest.update(np.asarray(features.lengths, dtype=np.int32).data)
        return digest.hexdigest()[:16]


def open_cache(
    prefix: Prefix, storage: Storage, collate: Callable[[Features, list[int]], dict[str, Tensor]], features: Features
) -> PrefixCache | None:
    """Return the cache of a prefix; None, with a notice, if the model cannot skip these layers (`Prefix.reproduces`).

    Args:
        prefix: as for `PrefixCache`.
        storage: as for `PrefixCache`.
        collate: as for `PrefixCache`.
        features: the training split, of which two rows are tried.
    """
    if prefix.reproduces(collate(features, list(range(min(2, len(features)))))):
        return PrefixCache(prefix, storage, collate)
    notice("train.prefix_cache is off: the layers of this model cannot be skipped one by one")
    return None


def _find(folder: Path, size: int) -> mmap.mmap | None:
    """Map the file of a stored prefix if it is intact. A damaged one is removed; one that cannot be read is kept."""
    if not os.path.lexists(folder):
        return None
    try:
        return _map(folder, size)
    except (*MISSING, ValueError, KeyError, TypeError, RecursionError) as error:
        say(f"notice: the stored prefix {folder} is damaged and computed again ({type(error).__name__}: {error})")
        remove_path(folder)
    except OSError as error:
        say(f"notice: the stored prefix {folder} cannot be read ({error.strerror}) and is kept; this run computes its own")
    return None


def _map(folder: Path, size: int) -> mmap.mmap:
    manifest = read_json(patiently(lambda: read_file(folder / _MANIFEST)))
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"schema {manifest['schema']}")
    with patiently(lambda: open_file(folder / _STATES)) as stream:
        if patiently(lambda: hash_stream(stream)) != manifest["sha256"]:
            raise ValueError(f"the checksum of {_STATES} does not match")
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)  # the hashed file, even if the name was replaced
    if len(mapped) != size:
        raise ValueError(f"{_STATES} has {len(mapped)} bytes, not {size}")
    return mapped
