"""The progress bar of a run in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from wlora.methods.base import Method


def progress_bar(total_steps: int, *, shown: bool) -> tqdm[Any]:
    """Return a bar over the optimiser steps; it is shown in a terminal only."""
    return tqdm(total=total_steps, unit="step", dynamic_ncols=True, disable=not shown or not sys.stderr.isatty())


def advance(bar: tqdm[Any], losses: list[float], metrics: Mapping[str, float], primary: str, method: Method) -> None:
    """Move the bar by one step, and show the last loss that was read, the primary metric and the number of adapters."""
    shown: dict[str, Any] = {"loss": f"{losses[-1]:.4f}"} if losses else {}
    shown |= {primary: f"{metrics[primary]:.4f}"} if primary in metrics else {}
    bar.set_postfix(shown | {"adapters": len(method.attached())}, refresh=False)
    bar.update()
