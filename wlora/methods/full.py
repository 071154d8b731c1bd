"""Full fine-tuning: every parameter of the model trains."""

from __future__ import annotations

from torch import nn

from wlora.methods.base import Method, Setting
from wlora.models.loading import head_parameters

# The release applies its name filter to "full" fine-tuning too (methods note §1.3): 30.7 % of DeBERTaV3-base.
_RELEASE_FILTER = ("attention.self", "output.dense", "intermediate.dence")


class FullFineTuning(Method):
    """Trains all parameters; in `compat=release` only those whose names pass the release's filter."""

    plain_base = True

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Let the body train; the head is the runner's, as with every method."""
        super().attach(model, setting)
        head = head_parameters(model)
        body = {name: p for name, p in model.named_parameters() if name not in head}
        named = [p for name, p in body.items() if any(part in name for part in _RELEASE_FILTER)]
        # The filter's names are BERT's and DeBERTa's; the release's script for BART has none.
        self.base_parameters = named if self.release and named else list(body.values())
        for p in self.base_parameters:
            p.requires_grad_(True)
