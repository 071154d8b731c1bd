"""On the PYTHONPATH of a run: after step 5 it waits for a signal, so that one from a test never comes too late.

Python imports this module when it starts; `tests/support/signals.py` is the other side. The run says that it waits by a file
in the folder `HELD`. A run that was resumed does not wait.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

HELD_AT = 5


class Holding(importlib.abc.MetaPathFinder):
    """Changes `Guard` as soon as it is imported: this process may be a launcher, which never does."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "wlora.training.interruption":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_hold(module: Any) -> None:
            execute(module)
            hold(module.Guard)

        spec.loader.exec_module = execute_and_hold  # type: ignore[method-assign]
        return spec


def hold(guard: Any) -> None:
    """Let a guard wait in the step until a signal has arrived."""
    before = guard.__call__

    def held(self: Any, trainer: Any) -> None:
        if trainer.step == HELD_AT and not self.record.resumed_at:
            Path(os.environ["HELD"], str(os.getpid())).touch()
            while self._signals.asked is None:
                time.sleep(0.01)
        before(self, trainer)

    guard.__call__ = held


sys.meta_path.insert(0, Holding())
