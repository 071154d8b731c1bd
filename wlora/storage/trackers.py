"""Sending the learning curve to an experiment tracker (`track`) through accelerate. Tracker errors never stop a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wlora.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
"""Packages of each tracker. One of them is sufficient."""

PROJECT = "wlora"


def require_tracker(track: str) -> None:
    """Check that the tracker is installed.

    Raises:
        ConfigError: the package is missing.
    """
    packages = PACKAGES.get(track, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise ConfigError(
            f"track={track}: the package {packages[0]} is not installed\nway out: pip install 'wlora[{track}]'"
        )


def tracking_folder(results_dir: str | Path) -> Path:
    """Return the folder for trackers that write files."""
    return Path(results_dir) / "tracking"


class Tracker:
    """Sends the points of a learning curve to a tracker. After the first error it prints one notice and stops sending.

    Args:
        accelerator: created with `log_with` if a tracker is used.
        say: prints a text for the user.
    """

    def __init__(self, accelerator: Accelerator, *, say: Callable[[str], None]) -> None:
        self._accelerator, self._say = accelerator, say
        self._broken = not accelerator.log_with

    def start(self, run_id: str, config: dict[str, Any]) -> None:
        """Start the tracker's run under the `run_id`. If the tracker supports it, a resumed run continues the same entry.

        Args:
            config: the resolved configuration.
        """
        # TensorBoard has no projects; each run is a folder.
        project = run_id if "tensorboard" in map(str, self._accelerator.log_with) else PROJECT
        kwargs = {"wandb": {"id": run_id, "name": run_id, "resume": "allow"}, "trackio": {"name": run_id, "resume": "allow"}}
        kwargs["mlflow"] = {"run_name": run_id}
        self._try(lambda: self._accelerator.init_trackers(project, config=flatten(config), init_kwargs=kwargs))

    def __call__(self, point: dict[str, Any]) -> None:
        """Send one point of the learning curve."""
        values = {k.replace(".", "/"): v for k, v in flatten(point).items() if isinstance(v, int | float) and k != "step"}
        self._try(lambda: self._accelerator.log(values, step=point["step"]))

    def finish(self) -> None:
        """Close the tracker's run, after success or failure."""
        self._try(lambda: [tracker.finish() for tracker in self._accelerator.trackers])

    def _try(self, act: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            act()
        except Exception as error:  # trackers raise many kinds of exceptions
            self._broken = True
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            self._say(f"notice: the tracker failed and is off ({type(error).__name__}: {reason}); the run continues")


def flatten(values: dict[str, Any], parent: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted keys. Lists and null become text, so that every tracker accepts the values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{parent}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
