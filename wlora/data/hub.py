"""Check which models and data must come from the hub and whether they are available. It takes seconds and needs no torch."""

from __future__ import annotations

import os
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from wlora.config.schema import Config
from wlora.errors import ConfigError

PROBE_SECONDS = 3.0


@dataclass(frozen=True)
class HubSource:
    """A model or data set that a run loads from the hub.

    Attributes:
        key: the argument that selects it, as the user writes it.
        repository: its hub id.
        cached: whether it is in the local cache.
        file: for a model, the first file that is requested; None for data.
        revision: the revision of `file`.
    """

    key: str
    repository: str
    cached: bool
    file: str | None = None
    revision: str | None = None


def require_sources(config: Config) -> None:
    """Check that the model and data of a run are cached or can be downloaded.

    If everything is cached and the hub cannot be reached, the hub libraries are switched to offline mode, so that they do
    not wait for a timeout.

    Raises:
        ConfigError: something is missing and the network is off (`offline`, `HF_HUB_OFFLINE`) or down, or the model's
            repository is gated and closed to this user.
    """
    wanted = _wanted(config)
    if not wanted:
        return
    missing = [source for source in wanted if not source.cached]
    offline = config.offline or _told_to_stay_offline()
    if not offline and _reachable():
        for source in missing:
            if source.file is not None:
                _refuse_gated(source)
        return
    if missing:
        reason = "offline" if offline else "no network"
        named = ", ".join(f"{source.key} ({source.repository})" for source in missing)
        raise ConfigError(
            f"{reason}, and not in the local cache: {named}\n"
            "ways out: task.path=DIR and model.path=DIR with local copies, a filled cache (HF_HOME), experiment=demo"
        )
    go_offline()


def fetch_file(repository: str, name: str, *, revision: str, key: str, offline: bool) -> Path:
    """Return the local path of one file of a model's repository, downloaded if it is not in the cache.

    Args:
        key: the argument that selects the repository, for messages.
        offline: whether the network may not be used.

    Raises:
        ConfigError: the repository or the file does not exist or is closed to this user, or there is no network.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    local = offline or _told_to_stay_offline() or not _reachable()
    try:
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=local))
    except GatedRepoError:
        raise _gated(key, repository) from None
    except LocalEntryNotFoundError:
        reason = "offline" if offline or _told_to_stay_offline() else "no network"
        raise ConfigError(
            f"{key}: {reason}, and {name} is not in the local cache\nway out: model.path=DIR, a local copy"
        ) from None
    except Exception as error:  # network errors have different classes in the libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"{key}: {name} cannot be read from the hub ({reason})") from None


def _gated(key: str, repository: str) -> ConfigError:
    return ConfigError(
        f"{key}: {repository} is gated: accept its licence on the repository's page and set HF_TOKEN or "
        "run `hf auth login`, or give a local copy as model.path=DIR"
    )


def go_offline() -> None:
    """Make the hub libraries use only their caches, even if they have already been imported."""
    import huggingface_hub.constants

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    os.environ.setdefault("WANDB_MODE", "offline")
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        # The library has already read the environment, for example in an earlier run of the sweep.
        datasets.config.HF_HUB_OFFLINE = True


def _wanted(config: Config) -> list[HubSource]:
    """List the model and data of a run that are neither local nor generated."""
    task, model = config.task, config.model
    found: list[HubSource] = []
    if model.path is None and model.source == "hub" and model.hub_id:
        file = model.gguf_file or "config.json"
        cached = _model_is_cached(model.hub_id, file, model.revision)
        found.append(HubSource(f"model={model.name}", model.hub_id, cached, file, model.revision))
    if task.path is None and task.generator is None and task.hub_id:
        found.append(HubSource(f"task={task.name}", task.hub_id, _dataset_is_cached(task.hub_id, task.subset)))
    return found


def _refuse_gated(source: HubSource) -> None:
    """Request a file as transformers will do. Errors other than `gated` are ignored here; loading will report them.

    Raises:
        ConfigError: the repository is gated, and there is no token or one without access.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import GatedRepoError

    assert source.file is not None
    url = hf_hub_url(source.repository, source.file, revision=source.revision, endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        get_hf_file_metadata(url, timeout=PROBE_SECONDS)
    except GatedRepoError:
        raise _gated(source.key, source.repository) from None
    except Exception:  # network errors have different classes in the libraries
        return


def _told_to_stay_offline() -> bool:
    """Tell whether environment variables of the hub libraries request offline mode."""
    named = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return named.lower() in ("1", "true", "yes", "on")


def _model_is_cached(repo: str, file: str, revision: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, file, revision=revision), str)


def _dataset_is_cached(repo: str, subset: str | None) -> bool:
    """Tell whether the datasets library has prepared the subset in its cache; offline, it can read only prepared subsets.

    Files in the cache of huggingface_hub (the data set card, or files of other subsets) are not sufficient.
    """
    from huggingface_hub import constants

    home = Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")).expanduser()
    folder = home / repo.replace("/", "___") / (subset or "default")
    return any(path.is_dir() for path in folder.glob("*/*"))  # version / commit


def _reachable() -> bool:
    """Tell whether the hub responds within `PROBE_SECONDS`, with any status. The thread also limits slow DNS look-ups."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS)
        except urllib.error.HTTPError:
            pass
        except Exception:  # OSError, and exceptions of http.client, which have no common base class
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
