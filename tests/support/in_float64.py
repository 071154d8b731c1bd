"""`python -m wlora.run` whose model, adapters and losses are in float64, so that other orders of summation do not show."""

from __future__ import annotations

import sys
from typing import Any

from wlora.cli import run
from wlora.experiment import run as experiment


def main() -> None:
    """Run the words of the command line."""
    before = experiment.assemble

    def assemble(*args: Any, **options: Any) -> Any:
        assembly = before(*args, **options)
        assembly.model.double()
        return assembly

    experiment.assemble = assemble
    sys.argv[0] = "wlora.cli.run"
    run.main()


if __name__ == "__main__":
    main()
