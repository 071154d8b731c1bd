"""One adapter trained alone (paper §3.1 and Figure 2), and its inner product with the full gradient."""

from __future__ import annotations

from torch import nn

from wlora.errors import wrong_value
from wlora.methods.base import AdapterMethod, Event, Setting, Steps
from wlora.methods.training_data import Phase, TrainingData

PRODUCT_BATCH = 64


class Single(AdapterMethod):
    """Attach an adapter to one target. After the last step record ⟨∇_W f(𝒲), BA⟩ (the paper's equation 2).

    W is the adapted weight. f is the mean loss over the training rows, in evaluation mode, of the pretrained body with
    the head that was trained together with the adapter (with `compat=release`: the head as initialised). The scale s is
    left out, as in the published code. The gradient of W is never built: with h = W x + ω·BA x the product equals ∂f/∂ω
    at ω = 0.

    Args:
        index: index of the target, counted from 0 at the lowest layer.
        gradient_rows: number of random training rows in f; None means all.
    """

    def __init__(self, *, rank: int, alpha: float, dropout: float, index: int, gradient_rows: int | None = None) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        self.index, self.gradient_rows = index, gradient_rows

    def plan(self, steps: Steps) -> None:
        """Store the number of the last step."""
        self._last = steps.total

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach one adapter.

        Raises:
            ConfigError: there is no target with this index.
        """
        n = len(setting.targets)
        if self.index >= n:
            raise wrong_value("method.index", self.index, f"0 to {n - 1}, the targets of this model")
        super().attach(model, Setting(setting.targets[self.index : self.index + 1], setting.universe, setting.generator))

    def phases(self, data: TrainingData, steps: int) -> list[Phase]:
        """Store the training data for the inner product."""
        self._data = data
        return super().phases(data, steps)

    def after_step(self, step: int) -> list[Event]:
        """Record the inner product after the last step."""
        if step != self._last:
            return []
        (name,) = self.adapters
        return [Event(step, "dot_product", {"adapter": name, "value": self.product()})]

    def product(self) -> float:
        """Return ⟨∇_W f(𝒲), BA⟩. The adapter is unchanged afterwards."""
        (adapter,) = self.adapters.values()
        before = adapter.omega, adapter.positive
        adapter.omega = nn.Parameter(adapter.A.new_zeros(()))
        adapter.positive = False
        rows = self._data.by_length(self._data.sample(self.gradient_rows or self._data.rows, self.generator))
        total = 0.0
        for start in range(0, len(rows), PRODUCT_BATCH):
            part = rows[start : start + PRODUCT_BATCH]
            (batch,) = self._data.batches(part, PRODUCT_BATCH)
            (gradient,) = self._data.gradients(batch, [adapter.omega])
            total += float(gradient) * len(part)
        adapter.omega, adapter.positive = before
        return total / (len(rows) * adapter.scale)
