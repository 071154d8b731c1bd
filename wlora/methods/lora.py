"""LoRA (Hu et al., 2021, arXiv 2106.09685): a low-rank adapter on every target, all trained to the end."""

from __future__ import annotations

from wlora.methods.base import AdapterMethod


class LoRA(AdapterMethod):
    """h = W x + (alpha/rank) · B A x; A and B train, nothing is ever cut or grown."""

    startable = True
