"""Checks of a run's requirements: optional packages, local files and the hub. This module does not import torch."""

from __future__ import annotations

from wlora.config.schema import Config
from wlora.data.hub import go_offline, require_sources
from wlora.data.own_tables import require_source
from wlora.data.sources import find_local
from wlora.models.source import require_extras
from wlora.storage.trackers import require_tracker


def require_all(config: Config) -> None:
    """Check that packages, files and hub data of a run are available. A dry run needs only local files.

    Missing local files are reported first, because only the user can correct a path. The paths of the model and adapters
    have already been checked by `wlora.experiment.resolve.resolve`.

    Raises:
        ConfigError: names what is missing and how to provide it.
    """
    require_source(config.task)
    find_local(config.task)
    if config.offline:
        go_offline()
    if not config.dry_run:
        require_extras(config.model)
        require_tracker(config.track)
        require_sources(config)
