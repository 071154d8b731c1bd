"""wlora: experiment runner for *WeightLoRA: Keep Only Necessary Adapters* and its baselines.

For your own training script, the package offers `attach`, `Handle` and `WLoRACallback`. They are imported on first use,
because `import wlora` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wlora.integration.attach import attach as attach
    from wlora.integration.handle import Handle as Handle
    from wlora.integration.trainer_callback import WLoRACallback as WLoRACallback

__version__ = "0.1.0"
NUMERICS_VERSION = 1
"""Increase this number when the same configuration gives other results. Runs of two versions are never averaged."""

_LAZY = {"attach": "attach", "Handle": "handle", "WLoRACallback": "trainer_callback"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'wlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"wlora.integration.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
