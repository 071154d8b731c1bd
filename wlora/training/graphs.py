"""CUDA graphs (`train.compile=graphs`): the forward and backward pass of a micro-batch is recorded once and then replayed.

With small batches a GPU waits for its next kernel. Replaying a recording launches all kernels of a pass at once.

`torch.cuda.graph` records forward and backward pass together, as one function of the inputs, and leaves the model as it is.
`make_graphed_callables` would record two graphs for each module, replace the module's `forward`, and copy every gradient.

- A recording is valid for one shape of the inputs. Batches are therefore padded to a few lengths (`Buckets`). A shape is
  computed without a recording when it first occurs, and so are shapes that occur only once, such as an odd last batch.
- A recording reads its inputs from fixed tensors and adds to fixed gradients. The gradients are zeroed at every step and
  not freed, so that recorded and other passes accumulate in the same tensors.
- A structural change (cut, growth, pruning, division of micro-batches after running out of memory) discards all recordings.
- Dropout masks differ in every replay: CUDA's default generator is registered with every graph, and replaying advances it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wlora.config.schema import Config
from wlora.console import notice
from wlora.data.features import INPUT_TYPES, Features
from wlora.errors import RunFault, ran_out_of_memory, shorten
from wlora.methods.registry import method_class
from wlora.models.architectures import read_architecture
from wlora.training.prefetch import Batch

# Recordings at once; other shapes are computed without. Texts of up to 512 tokens have 20 lengths of buckets.
MOST = 32
# Kinds of tasks whose labels are padded like the tokens.
_LABELLED_TOKENS = ("token_classification", "seq2seq")

Backward = Callable[[Batch], Tensor]
"""Adds the gradients of a micro-batch to those of the parameters and returns its loss, detached."""


def has_graphs(device: torch.device) -> bool:
    """Return whether a device can record and replay its work."""
    return device.type == "cuda"


def settle_graphs(config: Config, device: torch.device, processes: int) -> Config:
    """Return a configuration with `train.compile=off`, and give the reason, where `graphs` is not available."""
    if config.train.compile == "off":
        return config
    method, model = config.method["name"], config.model
    packed = model.gguf_file is not None or model.quantization != "none"
    layerdrop = any(value > 0 for key, value in read_architecture(model).items() if key.endswith("layerdrop"))
    reasons = {
        f"on this {device.type}, which has no CUDA graphs": not has_graphs(device),
        f"with {processes} processes": processes > 1,
        f"with method={method}, which acts within the backward pass or has adapters of its own": (
            not method_class(method).packable
        ),
        "with a quantised base": packed,
        "with train.gradient_checkpointing=true": config.train.gradient_checkpointing,
        f"with model={model.name}, which skips layers at random": layerdrop,
    }
    for reason, holds in reasons.items():
        if holds:
            notice(f"train.compile=graphs is off {reason}")
            return dataclasses.replace(config, train=dataclasses.replace(config.train, compile="off"))
    return config


def bucket(length: int) -> int:
    """Round a length up: to a multiple of 8 up to 64, then to one of four lengths between powers of two."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


class Buckets:
    """Collates batches of few lengths.

    Args:
        features: the training rows; no batch is padded beyond the longest of them.
        head: the kind of model head (`Task.head`).
        collate: the task's own padding of rows.
    """

    def __init__(self, features: Features, head: str, collate: Callable[[list[dict[str, Any]]], Batch]) -> None:
        self._features, self._collate = features, collate
        names = [*INPUT_TYPES, *(["labels"] if head in _LABELLED_TOKENS else [])]
        columns = {name: features.array(name) for name in names if name in features.table.column_names}
        self._longest = {name: pc.max(pc.list_value_length(column)).as_py() for name, column in columns.items()}

    def collate(self, rows: list[int]) -> Batch:
        """Return a batch of these rows on the CPU, padded to the length of a bucket.

        The task pads, on its own side and with its own fillers: it is given one more row of that length, which is removed.
        """
        features = self._features.rows(rows)
        longer = dict(features[0])
        for name, longest in self._longest.items():
            length = max(len(row[name]) for row in features)
            longer[name] = np.resize(longer[name], min(bucket(length), longest))
        return {name: value[:-1] for name, value in self._collate([*features, longer]).items()}


class Recorder(Protocol):
    """The device's part of the work. What is recorded is computed with the same tensors in every replay."""

    def run(self, compute: Callable[[], Tensor]) -> Tensor:
        """Compute now, in such a way that the same can be recorded afterwards."""
        ...

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record a computation without doing it; returns what replays it. The result is the same tensor every time."""
        ...


class CudaRecorder:
    """Records CUDA graphs, all in one pool of memory and from one stream."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, compute: Callable[[], Tensor]) -> Tensor:
        """Compute on the stream of the recordings: what a library sets up there at first use must not be recorded."""
        present = torch.cuda.current_stream()
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            found = compute()
        present.wait_stream(self._stream)
        return found

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record one graph. Waits for the device."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            found = compute()

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay


class _Reads(TorchDispatchMode):
    """Collects the tensors that a computation reads but does not make, by storage."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what one operation reads, and run it."""
        given = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        for tensor in given:
            if (storage := tensor.untyped_storage()._cdata) not in self._made:
                self.found.setdefault(storage, tensor.detach())
        out = func(*args, **(kwargs or {}))
        made = [value for value in torch.utils._pytree.tree_leaves(out) if isinstance(value, Tensor)]
        self._made |= {tensor.untyped_storage()._cdata for tensor in made} - self.found.keys()
        return out


@dataclass(frozen=True)
class _Recording:
    """A recorded pass.

    Attributes:
        inputs: the tensors that it reads its inputs from.
        replay: computes it and returns the loss.
        kept: all that it reads. A tensor of a cache, such as a table of positions, would otherwise be freed with the cache.
    """

    inputs: Batch
    replay: Callable[[], Tensor]
    kept: list[Tensor]


class Graphs:
    """The recordings of one run.

    Args:
        recorder: makes the recorder; called again when all recordings are discarded.

    Attributes:
        recorded: number of recordings so far.
        replayed: number of passes that were replayed.
    """

    def __init__(self, recorder: Callable[[], Recorder] | None = None) -> None:
        self._make = recorder or CudaRecorder
        self.recorded = self.replayed = 0
        self._changes: int | None = None
        self._forget()

    def _forget(self) -> None:
        self._recordings: dict[Any, _Recording] = {}
        self._recorder: Recorder | None = None
        self._met: set[Any] = set()
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def facts(self) -> dict[str, int]:
        """Return the facts for the record."""
        return {"graphs": self.recorded, "graph_passes": self.replayed}

    def begin(self, changes: int) -> None:
        """Begin the gradients of an optimiser step.

        Args:
            changes: number of structural changes so far; after another one nothing that was recorded is valid.
        """
        if changes != self._changes:
            self._changes = changes
            self._forget()
        if self._gradients:
            torch._foreach_zero_(list(self._gradients.values()))
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient

    def run(self, inputs: Batch, backward: Backward, parameters: Callable[[], list[nn.Parameter]]) -> Tensor:
        """Compute one micro-batch, by a recording if there is one of its shape, and return its loss.

        Args:
            inputs: all that changes between micro-batches, on the device.
            backward: computes it.
            parameters: returns what is trained.

        Raises:
            RunFault: the model reads values while it computes, or does something else that cannot be recorded.
        """
        shape = tuple((name, *value.shape) for name, value in inputs.items())
        if recording := self._recordings.get(shape):
            for name, value in inputs.items():
                recording.inputs[name].copy_(value, non_blocking=True)
            self.replayed += 1
            return recording.replay()
        self._recorder = self._recorder or self._make()
        loss = self._recorder.run(lambda: backward(inputs))
        if not self._gradients:
            # Only parameters that the loss depends on: others have no gradient, as without recordings.
            self._gradients = {p: p.grad for p in parameters() if p.grad is not None}
        # Right behind the same computation, which has filled every cache that it reads.
        if shape in self._met and len(self._recordings) < MOST:
            self._recordings[shape] = _record(self._recorder, inputs, backward)
            self.recorded += 1
        self._met.add(shape)
        return loss


def _record(recorder: Recorder, inputs: Batch, backward: Backward) -> _Recording:
    fixed = {name: value.clone() for name, value in inputs.items()}
    reads = _Reads()
    try:
        with reads:
            replay = recorder.record(lambda: backward(fixed))
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        raise RunFault(
            f"train.compile=graphs cannot record this model ({type(error).__name__}: {shorten(error)}): "
            "train.compile=off does without"
        ) from error
    return _Recording(fixed, replay, list(reads.found.values()))
