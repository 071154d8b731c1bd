"""Upload of a run's export to the hub: adapters or merged model, with tokenizer and model card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wlora.errors import ConfigError, RunFault, shorten
from wlora.experiment.export import OPTIONS as EXPORT_OPTIONS
from wlora.experiment.export import export, read_options

OPTIONS = {key: value for key, value in EXPORT_OPTIONS.items() if key not in ("to", "offline")} | {"private": "false"}
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def push(words: Sequence[str]) -> str:
    """Export a run and upload it to a repository of the hub, which is created if necessary; return its address.

    Raises:
        ConfigError: a wrong argument, or the run cannot be exported (`export`).
        RunFault: the hub refuses the upload or cannot be reached.
    """
    names, options = read_options(words, OPTIONS)
    if len(names) != 2 or not _REPOSITORY.fullmatch(names[1]):
        raise ConfigError(
            f"{shorten(' '.join(names)) or 'RUN_ID is missing'}: allowed is RUN_ID owner/name, a name on the hub"
        )
    run_id, repository = names
    private = options.pop("private")
    with tempfile.TemporaryDirectory() as folder:
        given = [f"{key}={value}" for key, value in options.items() if value is not None]
        exported = export([run_id, *given, f"to={Path(folder) / 'export'}"])
        return upload(exported, repository, private=private == "true", message=f"Run {run_id} of wlora")


def upload(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload a folder as a model repository in one commit; return its address.

    Raises:
        RunFault: the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        status, told = error.response.status_code, shorten(error.server_message or error)
        way_out = "\nway out: set HF_TOKEN to a token with write access, or run `hf auth login`"
        denied = way_out if status in (401, 403) else ""
        raise RunFault(f"push {repository}: the hub answers {status} ({told}){denied}") from error
    except Exception as error:  # the HTTP library, and thus the exception classes, depend on huggingface_hub's version
        raise RunFault(f"push {repository}: the hub cannot be reached ({type(error).__name__}: {shorten(error)})") from error
    return f"{hub.endpoint}/{repository}"
