"""Linear probe: only the head and the pooler train. It measures the frozen body and is the lower bound for adapters."""

from __future__ import annotations

from wlora.methods.base import Method


class Probe(Method):
    """Trains no adapters and has no schedule."""
