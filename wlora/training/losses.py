"""The losses of a run: they stay on the device until somebody asks for them, and must be finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from wlora.errors import RunFault

# Steps whose losses stay unread on the device at most: to read one is to wait for the device.
READ_EVERY = 8
# What methods and libraries raise for numbers that are not finite.
NUMERIC_ERRORS = (ArithmeticError, LookupError, RuntimeError, ValueError)


class Diverged(RunFault):
    """A loss, a score or what trains became infinite or not a number."""

    everywhere = True


class Losses:
    """The mean losses of the steps since the last point of the learning curve.

    Args:
        total_steps: of the run, for messages.
        trained: returns all parameters that train.

    Attributes:
        values: the losses that have been read.
    """

    def __init__(self, total_steps: int, trained: Callable[[], list[nn.Parameter]]) -> None:
        self.values: list[float] = []
        self._total, self._trained = total_steps, trained
        self._unread: list[tuple[int, Tensor]] = []

    def add(self, step: int, loss: Tensor) -> None:
        """Take the loss of a step, a scalar on the device, without waiting for it."""
        self._unread.append((step, loss))

    @property
    def due(self) -> bool:
        """Whether so many losses are unread that a number which is not finite must be looked for."""
        return len(self._unread) >= READ_EVERY

    def read(self) -> None:
        """Wait for the device, and take in the losses of the steps since this was last done.

        Raises:
            Diverged: one of them is not finite; the first such step is named.
        """
        unread, self._unread = self._unread, []
        values = torch.stack([loss for _, loss in unread]).tolist() if unread else []
        for (step, _), value in zip(unread, values, strict=True):
            if not math.isfinite(value):
                raise Diverged(f"the loss is {value} at step {step} of {self._total}")
            self.values.append(value)

    def take_mean(self) -> float:
        """Return the mean of the losses that have been read, and forget them."""
        mean = sum(self.values) / len(self.values)
        self.values.clear()
        return mean

    @contextlib.contextmanager
    def noticing_divergence(self, step: int) -> Iterator[None]:
        """Turn the failures that follow numbers which are not finite into one, `Diverged`.

        Once the norms of what trains are not finite, methods and libraries fail in their own ways, such as in an SVD.
        A loss that is not read yet may have been the first such number.
        """
        try:
            yield
        except Exception as error:
            self.read()
            if isinstance(error, FloatingPointError):
                what = str(error)
            elif isinstance(error, NUMERIC_ERRORS) and not all(p.norm().isfinite() for p in self._trained()):
                what = "the norm of what trains is not finite"
            else:
                raise
            raise Diverged(f"{what} at step {step} of {self._total}") from error
