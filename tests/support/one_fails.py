"""`python -m wlora.run` in a process that test_processes.py launches, with a fault on some of them for seed=0."""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import Tensor

from wlora.cli import run
from wlora.errors import ConfigError, RunFault
from wlora.experiment import shared_inputs as stock
from wlora.training.trainer import Trainer

FAULTS = {
    "mistake": ConfigError("task.path: this process cannot see the file"),
    "fault": RunFault("this process cannot write"),
    "disk": OSError(5, "Input/output error", "file"),
}


def main(kind: str, ranks: str, words: list[str]) -> None:
    """Let the processes named in `ranks` fail: while data are loaded, or (`fault`) in the middle of training."""
    seeds: list[int] = []
    material, step = stock.SharedInputs.material, Trainer._take_step

    def fail(number: int) -> None:
        if seeds[-1] == 0 and os.environ["RANK"] in ranks and number == (2 if kind == "fault" else 0):
            raise FAULTS[kind]

    def load(self: Any, config: Any, source: Any) -> Any:
        seeds.append(config.seed)
        fail(0)
        return material(self, config, source)

    def take_step(self: Trainer, number: int, loss: Tensor) -> None:
        fail(number)
        step(self, number, loss)

    stock.SharedInputs.material = load  # type: ignore[method-assign]
    Trainer._take_step = take_step  # type: ignore[method-assign]
    sys.argv = ["wlora.cli.run", *words]
    run.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
