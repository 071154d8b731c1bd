"""What has to come from the model and data hub, and whether it can: answered within seconds, before torch."""

from __future__ import annotations

import os
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

from wlora.config import Config
from wlora.errors import ConfigError

PROBE_SECONDS = 3.0


def require_sources(config: Config) -> None:
    """Refuse a run whose model or data are neither at hand nor reachable.

    Where everything is cached and the hub cannot be reached, the libraries are put in offline mode so that they do
    not wait for it.

    Raises:
        ConfigError: something is missing and the network is off (`offline`, `HF_HUB_OFFLINE`) or down.
    """
    wanted = _wanted(config)
    offline = config.offline or _told_to_stay_offline()
    if not wanted or (not offline and _reachable()):
        return
    missing = [
        f"{key} ({repo})"
        for key, kind, repo, subset, revision in wanted
        if not (_model_is_cached(repo, revision) if kind == "model" else _dataset_is_cached(repo, subset))
    ]
    if missing:
        reason = "offline" if offline else "no network"
        raise ConfigError(
            f"{reason}, and not in the local cache: {', '.join(missing)}\n"
            "ways out: task.path=DIR and model.path=DIR with local copies, a filled cache (HF_HOME), experiment=demo"
        )
    go_offline()


def go_offline() -> None:
    """Make the hub libraries use their caches only, whether they are imported yet or not."""
    import huggingface_hub.constants

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        # It has read the environment already: an earlier run of the sweep had the network.
        datasets.config.HF_HUB_OFFLINE = True


def _wanted(config: Config) -> list[tuple[str, str, str, str | None, str]]:
    """List (key, kind, repository, subset, revision) of what is neither local nor generated."""
    task, model = config.task, config.model
    found: list[tuple[str, str, str, str | None, str]] = []
    if model.path is None and model.source == "hub" and model.hub_id:
        found.append((f"model={model.name}", "model", model.hub_id, None, model.revision))
    if task.path is None and task.generator is None and task.hub_id:
        found.append((f"task={task.name}", "dataset", task.hub_id, task.subset, task.revision))
    return found


def _told_to_stay_offline() -> bool:
    """Tell whether the user's environment says so, in the words the hub's library takes."""
    named = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return named.lower() in ("1", "true", "yes", "on")


def _model_is_cached(repo: str, revision: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str)


def _dataset_is_cached(repo: str, subset: str | None) -> bool:
    """Tell whether the datasets library has prepared the subset: off the network it reads nothing else.

    What the hub's own cache holds (the card, or another subset's files) does not help it.
    """
    from huggingface_hub import constants

    home = Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")).expanduser()
    folder = home / repo.replace("/", "___") / (subset or "default")
    return any(path.is_dir() for path in folder.glob("*/*"))  # version / commit


def _reachable() -> bool:
    """Ask the hub for an answer, any answer; a name look-up that hangs counts as none."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS)
        except urllib.error.HTTPError:
            pass
        except Exception:  # besides OSError those of http.client, which have no class in common with it
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
