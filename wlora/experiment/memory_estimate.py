"""The memory that a training step will take, from the architecture alone (`dry_run=true`)."""

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

# float32 value, gradient and AdamW's two moments.
TRAINED_BYTES = 16
# bitsandbytes keeps a float32 scale per so many nf4 weights.
NF4_BLOCK = 64
# Left free for the workspace of kernels and what an allocator cannot use.
RESERVE = 0.1


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step at one number of adapters.

    Attributes:
        adapters: how many are connected.
        frozen: weights that do not train, as they are stored.
        trained: weights that do, with gradients and the optimiser's moments.
        activations: what a full micro-batch saves for its backward pass.
    """

    adapters: int
    frozen: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.frozen + self.trained + self.activations

    def fits(self, gigabytes: float) -> bool:
        """Tell whether a device of so many GB (10⁹ bytes) holds it, with a tenth to spare."""
        return self.total <= (1 - RESERVE) * gigabytes * 1e9


def estimate(config: Config, precision: Precision, steps: Steps) -> list[Memory]:
    """Estimate a step with all adapters, then with the `k` highest and the `k` lowest where the method keeps k.

    The model runs once per estimate without memory or numbers, as the CPU's kernels would run it: a GPU's attention may
    keep less. A quantised base is taken to save what a plain one does.

    Args:
        steps: the length of the run, which some methods' structure depends on.

    Raises:
        RuntimeError: the method computes with numbers that are not there.
    """
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization="none"))
    model = build_example(plain, "meta")
    method = assemble(plain, model, prepare_method(plain, steps), precision).method
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_shapes(model)
        batch = make_batch(model, config)
        if build_task(config.task).head != "seq2seq":
            # Labels add next to nothing, and some heads look into them; a text's loss over the whole vocabulary counts.
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
    """Put tensors of the CPU that have a shape and no content in the place of those on the meta device."""
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
    except DynamicOutputShapeException:  # BART's classification head looks for the ends of the texts
        body = model.base_model
        activations = saved_bytes(body, batch)
    return Memory(
        adapters=len(adapters),  # type: ignore[arg-type]
        frozen=_stored_bytes(model, frozen, config.model.quantization),
        trained=TRAINED_BYTES * sum(p.numel() for p in trained),
        activations=activations,
    )


def _stored_bytes(model: nn.Module, parameters: set[nn.Parameter], quantization: str) -> int:
    """Return the bytes of frozen weights; the linears of a quantised body are packed."""
    packed: set[Tensor] = {module.weight for module in packed_linears(model)} if quantization != "none" else set()
    elements = sum(p.numel() for p in packed)
    dense = sum(p.numel() * p.element_size() for p in parameters - packed)
    return dense + (elements // 2 + 4 * elements // NF4_BLOCK if quantization == "nf4" else elements)


def tell(found: list[Memory], config: Config) -> list[str]:
    """Say what was estimated, in lines for the user."""
    first, *cuts = found
    parts = f"frozen weights {_gib(first.frozen)}, what trains {_gib(first.trained)}"
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
