"""A toy model and the training loop's order of calls, for tests of one method without a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wlora.methods.base import Event, Method, Setting, Steps
from wlora.methods.registry import build_method
from wlora.models.targets import Target
from wlora.training.optimizers import Optimizers

N, WIDTH, ROWS = 6, 16, 32
COMMON: dict[str, Any] = {"rank": 2, "alpha": 4, "dropout": 0.0}
SELECTION = {"k": 2, "lr_omega": 0.5, "select_steps": None, "project_every": 1}
PLUS = {**SELECTION, "schedule": "single", "extension": "qr", "rescale": False, "keep_moments": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "probe": {},
    "lora": COMMON,
    "wlora": {**COMMON, **SELECTION},
    "wlora_plus": {**COMMON, **PLUS},
    "rlora": {**COMMON, **SELECTION, "draw": "at_projection"},
}


class Tanh(nn.Module):
    """A toy body of N equal layers with a head, as the policies see a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(N))
        self.classifier = nn.Linear(WIDTH, 1)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: torch.Tensor = self.classifier(x)
        return out.squeeze(-1)


class Rig:
    """A method on the toy model with the loop's order of calls."""

    def __init__(self, name: str, *, release: bool = False, seed: int = 0, steps: int = 40, **changed: Any) -> None:
        torch.manual_seed(0)
        self.model = Tanh()
        self.x, self.y = torch.randn(ROWS, WIDTH), torch.randn(ROWS)
        self.method: Method = build_method({"name": name, **SETTINGS[name], **changed}, release=release)
        self.method.plan(Steps(total=steps, per_epoch=steps))
        targets = [Target(f"layers.{index}", index, "linear") for index in range(N)]
        self.method.attach(self.model, Setting(targets, targets, torch.Generator().manual_seed(seed)))
        self.optimizers = Optimizers(self.method.groups(1e-2), weight_decay=0.01, release=release)
        self.events: list[Event] = []
        self.step = 0

    def run(self, steps: int) -> Rig:
        for _ in range(steps):
            self.step += 1
            ((self.model(self.x) - self.y) ** 2).mean().backward()
            for event in self.method.before_step(self.step):
                self._take(event)
            self.optimizers.step()
            for event in self.method.after_step(self.step):
                self._take(event)
            self.optimizers.zero_grad()
        return self

    def _take(self, event: Event) -> None:
        self.events.append(event)
        self.optimizers.rebuild(self.method.groups(1e-2))

    @property
    def omega(self) -> list[float]:
        return [float(a.omega.detach()) for a in self.method.adapters.values() if a.omega is not None]
