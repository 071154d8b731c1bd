"""LoRA (Hu et al., 2021, arXiv 2106.09685): one low-rank adapter per target; all train until the end of the run."""

from __future__ import annotations

from wlora.methods.base import AdapterMethod


class LoRA(AdapterMethod):
    """h = W x + (alpha/rank) · B A x. A and B train; adapters are never removed or extended."""

    startable = True
    packable = True
