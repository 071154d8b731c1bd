"""Replay a trajectory of the paper's release with this project's layer, method and optimisers.

    python scripts/golden.py FILE

FILE is JSON; its field `what` describes the schema. The script prints the largest absolute differences of ω and of the loss
over all steps. The exit code is 1 if one of them exceeds 1e-8.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wlora.methods.base import Setting
from wlora.methods.release import ReleaseWLoRA
from wlora.models.targets import Target
from wlora.training.optimizers import Optimizers

TOLERANCE = 1e-8


class TanhChain(nn.Module):
    """h ← tanh(W_i h) for each layer in turn, then head · h."""

    def __init__(self, weights: Tensor, head: Tensor) -> None:
        super().__init__()
        n, d, _ = weights.shape
        self.layers = nn.ModuleList(nn.Linear(d, d, bias=False, dtype=weights.dtype) for _ in range(n))
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.head = head

    def forward(self, h: Tensor) -> Tensor:
        """Map [rows, d] to [rows]."""
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h @ self.head


def replay(golden: dict[str, Any]) -> tuple[float, float]:
    """Return the largest absolute differences of ω and of the loss over the trajectory."""
    settings = golden["settings"]
    data = {key: torch.tensor(golden[key], dtype=torch.float64) for key in ("W", "A0", "X", "y", "head")}
    model = TanhChain(data["W"], data["head"])
    method = ReleaseWLoRA(
        rank=settings["r"],
        alpha=settings["alpha"],
        dropout=0.0,
        k=settings["k"],
        lr_omega=settings["lr_omega"],
        select_steps=None,
        project_every=settings["project_every"],
    )
    method.attach(model, Setting([Target(f"layers.{i}", i, "linear") for i in range(settings["n"])]))
    model.double()
    start_B = torch.zeros_like(data["A0"].mT) if golden["B0"] == "zeros" else torch.tensor(golden["B0"]).double()
    for adapter, A0, B0 in zip(method.adapters.values(), data["A0"], start_B, strict=True):
        # In the file, A (d×r) and B (r×d) are multiplied from the right; ours are the transposes.
        adapter.A.data, adapter.B.data = A0.T.clone(), B0.T.clone()
        assert adapter.omega is not None
        adapter.omega.data.fill_(golden["omega0"])
    optimizers = Optimizers(method.groups(settings["lr"]), weight_decay=settings["weight_decay"], release=True)
    worst_omega = worst_loss = 0.0
    for row in golden["trajectory"]:
        loss = ((model(data["X"]) - data["y"]) ** 2).mean()
        loss.backward()
        optimizers.step()
        method.after_step(row["step"])
        optimizers.zero_grad()
        worst_loss = max(worst_loss, abs(loss.item() - row["loss"]))
        found = method.omegas().values()
        worst_omega = max(worst_omega, *(abs(a - b) for a, b in zip(found, row["omega"], strict=True)))
    return worst_omega, worst_loss


def main() -> None:
    """Replay the file named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FILE")
    worst_omega, worst_loss = replay(json.loads(Path(sys.argv[1]).read_text()))
    print(
        f"worst difference over the trajectory: omega {worst_omega:.1e}, loss {worst_loss:.1e} (tolerance {TOLERANCE:.0e})"
    )
    sys.exit(max(worst_omega, worst_loss) > TOLERANCE)


if __name__ == "__main__":
    main()
