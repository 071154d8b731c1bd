"""Estimate of the memory of a training step from the architecture alone (`dry_run=true`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from transformers import PreTrainedModel

from wlora.config.schema import Config
from wlora.experiment.build import assemble, prepare_method
from wlora.methods.base import Steps
from wlora.models.first_token import first_token_alone
from wlora.models.quantization import packed_linears
from wlora.tasks.base import build_task
from wlora.training.activation_memory import build_example, make_batch, saved_bytes
from wlora.training.precision import Precision

# Bytes per trained parameter: float32 value, gradient, and the two moments of AdamW.
TRAINED_BYTES = 16
# Number of nf4 weights that share one float32 scale in bitsandbytes.
NF4_BLOCK = 64
# Fraction of device memory reserved for kernel workspaces and fragmentation of the allocator.
RESERVE = 0.1


@dataclass(frozen=True)
class Memory:
    """Memory of a training step in bytes for a given number of adapters.

    Attributes:
        adapters: number of connected adapters.
        frozen: frozen weights in their stored form.
        trained: trained weights with their gradients and optimiser moments.
        activations: tensors saved for the backward pass of a full micro-batch.
    """

    adapters: int
    frozen: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts in bytes."""
        return self.frozen + self.trained + self.activations

    def fits(self, gigabytes: float) -> bool:
        """Tell whether the step fits on a device with this many GB (10⁹ bytes), leaving a tenth free."""
        return self.total <= (1 - RESERVE) * gigabytes * 1e9


def estimate(config: Config, precision: Precision, steps: Steps) -> list[Memory]:
    """Estimate a step with all adapters and, if the method keeps k of them, with the `k` highest and the `k` lowest.

    For each estimate the model runs once on fake tensors (shapes without data) with CPU kernels. A GPU's attention kernels
    may save less. We assume that quantisation does not change the saved activations.

    Args:
        config: a resolved configuration.
        precision: precision of the frozen base.
        steps: length of the run; the structure of some methods depends on it.

    Raises:
        RuntimeError: the method needs tensor values, which fake tensors do not have.
    """
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization="none"))
    model = build_example(plain, "meta")
    method = assemble(plain, model, prepare_method(plain, steps), precision).method
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_shapes(model)
        batch = make_batch(model, config)
        if build_task(config.task).head != "seq2seq":
            # Labels need almost no memory, and some heads read their values, which fake tensors lack. For text generation
            # the labels are kept, because the loss over the whole vocabulary needs much memory.
            batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = [_measure(model, method.attached(), batch, config)]
        k = config.method.get("k")
        if k is None or len(method.adapters) <= k:
            return found
        names = list(method.adapters)
        for kept in (names[-k:], names[:k]):
            with method.adapters.only(kept):
                found.append(_measure(model, method.adapters, batch, config))
        return found


def _give_shapes(model: nn.Module) -> None:
    """Replace tensors on the meta device by fake CPU tensors of the same shape."""
    given: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in given:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trains = tensor.requires_grad
                    given[tensor] = nn.Parameter(empty, trains) if isinstance(tensor, nn.Parameter) else empty
                tensors[name] = given[tensor]  # type: ignore[assignment]


def _measure(model: PreTrainedModel, adapters: object, batch: dict[str, Tensor], config: Config) -> Memory:
    trained = {p for p in model.parameters() if p.requires_grad}
    frozen = {p for p in model.parameters() if not p.requires_grad}
    body = model
    try:
        with first_token_alone(model):
            activations = saved_bytes(body, batch)
    except DynamicOutputShapeException:  # heads of encoder-decoders search for end tokens, whose number is unknown
        body = model.base_model
        # BART makes the decoder's inputs from those of the encoder, T5's bare model does not.
        activations = saved_bytes(body, {**batch, "decoder_input_ids": batch["input_ids"]})
    return Memory(
        adapters=len(adapters),  # type: ignore[arg-type]
        frozen=_stored_bytes(model, frozen, config.model.quantization),
        trained=TRAINED_BYTES * sum(p.numel() for p in trained),
        activations=activations,
    )


def _stored_bytes(model: nn.Module, parameters: set[nn.Parameter], quantization: str) -> int:
    """Return the bytes of frozen weights; the linear layers of a quantised model are stored packed."""
    packed = {module.get_parameter("weight") for module in packed_linears(model)} if quantization != "none" else set()
    elements = sum(p.numel() for p in packed)
    dense = sum(p.numel() * p.element_size() for p in parameters - packed)
    return dense + (elements // 2 + 4 * elements // NF4_BLOCK if quantization == "nf4" else elements)


def tell(found: list[Memory], config: Config) -> list[str]:
    """Format the estimates as lines for the user."""
    first, *cuts = found
    parts = f"frozen weights {_gib(first.frozen)}, trained weights {_gib(first.trained)}"
    rows = f"{config.task.batch_size}×{config.task.max_length} tokens"
    parts += f", activations of {rows} {_gib(first.activations)}"
    lines = [f"{_gib(first.total)} GiB with {first.adapters} adapters: {parts}"]
    if cuts:
        low, high = sorted(memory.total for memory in cuts)
        lines.append(f"{_gib(low)} to {_gib(high)} GiB with {cuts[0].adapters} of them, in the highest to the lowest layers")
    fitting = [f"{size} GB" for size in (16, 80) if first.fits(size)]
    later = [f"{size} GB" for size in (16, 80) if not first.fits(size) and cuts and cuts[0].fits(size)]
    fit = f"fits {' and '.join(fitting)}" if fitting else "fits neither 16 GB nor 80 GB"
    lines.append(fit + (f"; once cut to the highest layers, {' and '.join(later)}, too" if later else ""))
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
