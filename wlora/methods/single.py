"""One adapter alone (the paper, §3.1 and Figure 2): train it, then take its product with the full gradient."""

from __future__ import annotations

from torch import nn

from wlora.errors import wrong_value
from wlora.methods.base import AdapterMethod, Event, Setting, Steps
from wlora.methods.training_data import Bench, Phase

PRODUCT_BATCH = 64


class Single(AdapterMethod):
    """Attach an adapter to one target; after the last step record ⟨∇_W f(𝒲), BA⟩ (the paper's equation 2).

    f is the mean loss over the training rows, in evaluation mode, of the pretrained body under the head that was trained
    with the adapter (in `compat=release`: the head as initialised); W is the adapted weight; the scale s is left out, as
    in the release. No gradient of W is ever built: with h = W x + ω·BA x the product is ∂f/∂ω at ω = 0.

    Args:
        index: the target, counted from 0 and the lowest layer.
        gradient_rows: how many training rows, drawn at random, make up f; None for all.
    """

    def __init__(self, *, rank: int, alpha: float, dropout: float, index: int, gradient_rows: int | None = None) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        self.index, self.gradient_rows = index, gradient_rows

    def plan(self, steps: Steps) -> None:
        """Note the last step."""
        self._last = steps.total

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach the one adapter."""
        n = len(setting.targets)
        if self.index >= n:
            raise wrong_value("method.index", self.index, f"0 to {n - 1}, the targets of this model")
        super().attach(model, Setting(setting.targets[self.index : self.index + 1], setting.universe, setting.generator))

    def phases(self, bench: Bench, steps: int) -> list[Phase]:
        """Keep the bench for the product."""
        self._bench = bench
        return super().phases(bench, steps)

    def after_step(self, step: int) -> list[Event]:
        """Record the product at the end."""
        if step != self._last:
            return []
        (name,) = self.adapters
        return [Event(step, "dot_product", {"adapter": name, "value": self.product()})]

    def product(self) -> float:
        """Return ⟨∇_W f(𝒲), BA⟩; the adapter is as before when this returns."""
        (adapter,) = self.adapters.values()
        before = adapter.omega, adapter.positive
        adapter.omega = nn.Parameter(adapter.A.new_zeros(()))
        adapter.positive = False
        rows = self._bench.by_length(self._bench.sample(self.gradient_rows or self._bench.rows, self.generator))
        total = 0.0
        for start in range(0, len(rows), PRODUCT_BATCH):
            part = rows[start : start + PRODUCT_BATCH]
            (batch,) = self._bench.batches(part, PRODUCT_BATCH)
            (gradient,) = self._bench.gradients(batch, [adapter.omega])
            total += float(gradient) * len(part)
        adapter.omega, adapter.positive = before
        return total / (len(rows) * adapter.scale)
