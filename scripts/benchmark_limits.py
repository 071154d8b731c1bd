"""What steps are measured by: a clock, the operations dispatched, and the machine's limit for matrix products."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmark_runs import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wlora.training.precision import Precision

# Rows, inputs and outputs of the products that the limit is measured with: those of DeBERTaV3-base's feed-forward network.
_PRODUCT = (2048, 768, 3072)


class Counter(TorchDispatchMode):
    """Counts the operations that are dispatched to the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation and run it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operations(step: Callable[[], object]) -> int:
    """Take a step and return the number of operations dispatched in it."""
    with Counter() as counter:
        step()
    return int(counter.count)


def count_products(step: Callable[[], object]) -> int:
    """Take a step and return the number of floating-point operations of its matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def time_step(step: Callable[[], object]) -> float:
    """Take a step and return its seconds; with one thread on a CPU those of the processor, without other processes'."""
    clock = time.process_time if DEVICE.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _synchronize()
    begin = clock()
    step()
    _synchronize()
    return clock() - begin


@functools.cache
def product_rate(precision: str) -> float:
    """Return how many floating-point operations of a large matrix product this machine does in a second.

    Args:
        precision: `fp32`, `bf16` or `fp16`.
    """
    rows, inputs, outputs = _PRODUCT
    dtype = Precision(precision, "").dtype
    x = torch.randn(rows, inputs, device=DEVICE).to(dtype)
    weight = torch.randn(inputs, outputs, device=DEVICE).to(dtype)
    seconds = [time_step(lambda: x @ weight) for _ in range(12)]
    return 2 * rows * inputs * outputs / statistics.median(seconds[2:])


def _synchronize() -> None:
    """Wait for what the GPU has been given to do."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
