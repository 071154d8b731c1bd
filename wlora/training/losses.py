"""The losses of a run. They stay on the device until they are read, and must be finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from wlora.errors import RunFault

# Maximum number of unread losses on the device. Reading a loss makes the host wait for the device.
READ_EVERY = 8
# Errors that methods and libraries raise for numbers that are not finite.
NUMERIC_ERRORS = (ArithmeticError, LookupError, RuntimeError, ValueError)


class Diverged(RunFault):
    """A loss, a score or a trained parameter became infinite or NaN."""

    everywhere = True


class Losses:
    """The mean losses of the steps since the last point of the learning curve.

    Args:
        total_steps: steps of the run, for messages.
        trained: returns all trained parameters.

    Attributes:
        values: the losses that have been read.
    """

    def __init__(self, total_steps: int, trained: Callable[[], list[nn.Parameter]]) -> None:
        self.values: list[float] = []
        self._total, self._trained = total_steps, trained
        self._unread: list[tuple[int, Tensor]] = []

    def add(self, step: int, loss: Tensor) -> None:
        """Add the loss of a step, a scalar on the device, without waiting for the device."""
        self._unread.append((step, loss))

    @property
    def due(self) -> bool:
        """Whether the maximum number of unread losses is reached, so that they must be checked."""
        return len(self._unread) >= READ_EVERY

    def read(self) -> None:
        """Wait for the device and read all unread losses.

        Raises:
            Diverged: a loss is not finite. The message names the first such step.
        """
        unread, self._unread = self._unread, []
        values = torch.stack([loss for _, loss in unread]).tolist() if unread else []
        for (step, _), value in zip(unread, values, strict=True):
            if not math.isfinite(value):
                raise Diverged(f"the loss is {value} at step {step} of {self._total}")
            self.values.append(value)

    def take_mean(self) -> float:
        """Return the mean of the losses that have been read, and remove them."""
        mean = sum(self.values) / len(self.values)
        self.values.clear()
        return mean

    @contextlib.contextmanager
    def noticing_divergence(self, step: int) -> Iterator[None]:
        """Convert errors caused by numbers that are not finite to `Diverged`.

        If trained parameters are not finite, methods and libraries fail with various errors, for example in an SVD. The
        first such number may be a loss that has not been read yet.
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
