"""The modules that a run could adapt, by layer and kind, and whether its method selected among them."""

from __future__ import annotations

from wlora.analysis.study import Run
from wlora.config.schema import restore_config
from wlora.models.architectures import read_architecture
from wlora.models.targets import Target, list_targets
from wlora.tasks.base import find_kind


def targets_of(run: Run) -> list[Target]:
    """Return the modules that a run could adapt."""
    config = restore_config(run.record.config)
    # The model's files may not be on this machine, so shapes are read from the architecture.
    config.model.path = None
    head = find_kind(config.task.kind).head
    return list_targets(read_architecture(config.model), config.method["targets"], head)


def short_kind(kind: str) -> str:
    """Shorten a module's name for an axis: `attention.self.query` is `query`."""
    words = kind.split(".")
    return ".".join(words[-2:]) if words[-1] == "dense" else words[-1].removesuffix("_proj")


def selects(run: Run) -> bool:
    """Tell whether a run's method has chosen among its adapters, as WLoRA does."""
    return any(event.get("kind") in ("cut", "select") for event in run.record.events)
