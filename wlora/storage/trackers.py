"""The learning curve in an experiment tracker (`track`), through accelerate. It never stops a run."""

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
"""The packages of each, any of which will do."""

PROJECT = "wlora"


def require_tracker(track: str) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ConfigError: the package is missing.
    """
    packages = PACKAGES.get(track, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise ConfigError(
            f"track={track}: the package {packages[0]} is not installed\nway out: pip install 'wlora[{track}]'"
        )


def tracking_folder(results_dir: str | Path) -> Path:
    """Return where trackers that write files write them."""
    return Path(results_dir) / "tracking"


class Tracker:
    """Hands the points of a learning curve on; after the first failure it says so once and does nothing more.

    Args:
        accelerator: was made with `log_with`, if there is to be a tracker.
        say: tells the user.
    """

    def __init__(self, accelerator: Accelerator, *, say: Callable[[str], None]) -> None:
        self._accelerator, self._say = accelerator, say
        self._broken = not accelerator.log_with

    def start(self, run_id: str, config: dict[str, Any]) -> None:
        """Open the run under its `run_id`, where the tracker can so that a resumed run goes on in it.

        Args:
            config: the resolved configuration.
        """
        # TensorBoard knows no projects: there a run is a folder.
        project = run_id if "tensorboard" in map(str, self._accelerator.log_with) else PROJECT
        kwargs = {"wandb": {"id": run_id, "name": run_id, "resume": "allow"}, "trackio": {"name": run_id, "resume": "allow"}}
        kwargs["mlflow"] = {"run_name": run_id}
        self._try(lambda: self._accelerator.init_trackers(project, config=flatten(config), init_kwargs=kwargs))

    def __call__(self, point: dict[str, Any]) -> None:
        """Hand on a point of the learning curve."""
        values = {k.replace(".", "/"): v for k, v in flatten(point).items() if isinstance(v, int | float) and k != "step"}
        self._try(lambda: self._accelerator.log(values, step=point["step"]))

    def finish(self) -> None:
        """Close the run, however it ended."""
        self._try(lambda: [tracker.finish() for tracker in self._accelerator.trackers])

    def _try(self, act: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            act()
        except Exception as error:  # whatever a tracker's library raises
            self._broken = True
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            self._say(f"notice: the tracker fails and gets nothing more ({type(error).__name__}: {reason}); the run goes on")


def flatten(values: dict[str, Any], parent: str = "") -> dict[str, Any]:
    """Return nested values by dotted keys, lists and null as text: what every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{parent}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
