"""What a run needs that may not be there: extras, local files, the hub. Nothing here imports torch."""

from __future__ import annotations

from wlora.config.schema import Config
from wlora.data.hub import go_offline, require_sources
from wlora.data.sources import find_local
from wlora.models.source import require_extras
from wlora.storage.trackers import require_tracker


def require_all(config: Config) -> None:
    """Refuse a run for which something is not installed, or neither at hand nor reachable; a dry run needs only files.

    A wrong path, which only the user can mend, is told before anything else that is missing. Those of the model and of the
    adapters have been looked at by `wlora.experiment.resolve.resolve`.

    Raises:
        ConfigError: what is missing, and the way out.
    """

    find_local(config.task)
    if config.offline:
        go_offline()
    if not config.dry_run:
        require_extras(config.model)
        require_tracker(config.track)
        require_sources(config)
