"""Runs in other processes that wait for a signal, whatever the load of the machine."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from tests.conftest import ROOT

PATIENCE = 300.0
"""Seconds after which a process that should have reached a step is given up."""


def holding(folder: Path) -> dict[str, str]:
    """Return an environment in which a run waits for a signal; its process says in the folder that it does."""
    folder.mkdir()
    path = os.pathsep.join([str(ROOT / "tests" / "support" / "held"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "HELD": str(folder), "OMP_NUM_THREADS": "1"}


def wait_until_held(process: subprocess.Popen[str], folder: Path, *, processes: int = 1) -> list[int]:
    """Wait for that many processes of a run; returns their process ids."""
    deadline = time.monotonic() + PATIENCE
    while len(held := list(folder.iterdir())) < processes:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.02)
    return [int(file.name) for file in held]
