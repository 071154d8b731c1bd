"""Linear probe: only the head and the pooler train. What the frozen body already knows; the floor for adapters."""

from __future__ import annotations

from wlora.methods.base import Method


class Probe(Method):
    """No adapters and no schedule."""
