"""Full fine-tuning: every parameter of the model trains."""

from __future__ import annotations

from torch import nn

from wlora.methods.base import Method, Setting
from wlora.models.heads import head_parameters


class FullFineTuning(Method):
    """Trains all parameters of the model."""

    plain_base = True

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Make the body trainable. The trainer handles the head, as for every method."""
        super().attach(model, setting)
        head = head_parameters(model)
        self.base_parameters = [p for name, p in model.named_parameters() if name not in head]
        for p in self.base_parameters:
            p.requires_grad_(True)
