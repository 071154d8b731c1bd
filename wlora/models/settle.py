"""Determine the model of a configuration if its YAML does not: with `model=hub`, or `model.path` of another family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from wlora.config.schema import ModelConfig, config_folder
from wlora.config.spelling import expand_home
from wlora.data.hub import fetch_file
from wlora.errors import ConfigError, wrong_value
from wlora.models.architectures import read_architecture
from wlora.reading import read_file, read_json

# The name in `conf/model/hub.yaml`, a placeholder for any model.
ANY = "hub"
# Keys of a `config.json` that describe files or an earlier training, not the architecture.
_NOT_ARCHITECTURE = (
    *("_name_or_path", "name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache"),
    *("id2label", "label2id", "_num_labels", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
)


def settle_model(model: ModelConfig, *, offline: bool) -> None:
    """Fill in the architecture of a hub model without a YAML file, or of a folder that does not fit the chosen YAML file.

    If `model.path` contains another family than the YAML file, the file does not describe it. Then name, architecture,
    checksum and defaults are taken from the folder.

    Args:
        model: a composed configuration; changed in place.
        offline: whether the network may not be used.

    Raises:
        ConfigError: `model.hub_id` is missing or not a repository with a readable `config.json`; also the errors of
            `read_architecture`.
    """
    if model.path is not None:
        found = read_architecture(model)
        if found["model_type"] != model.architecture.get("model_type"):
            named = (config_folder() / "model" / f"{model.name}.yaml").is_file()
            model.name = _as_name(Path(expand_home("model.path", model.path)).absolute().name) if named else model.name
            model.architecture = _strip(found)
            model.sha256 = model.accumulation_steps = model.k = None
    elif model.source == "hub":
        if model.hub_id is None or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model.hub_id):
            given = "null" if model.hub_id is None else model.hub_id
            raise wrong_value("model.hub_id", given, "OWNER/NAME, a repository of the hub; or set model.path=DIR")
        model.architecture = model.architecture or _strip(_read_hub_config(model, offline=offline))
        model.name = _as_name(model.hub_id.rpartition("/")[2]) if model.name == ANY else model.name


def _read_hub_config(model: ModelConfig, *, offline: bool) -> dict[str, Any]:
    assert model.hub_id is not None
    where = f"model.hub_id={model.hub_id}"
    file = fetch_file(model.hub_id, "config.json", revision=model.revision, key=where, offline=offline)
    try:
        content = read_json(read_file(file))
        content["model_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where}: config.json cannot be read or has no model_type ({error})") from None
    return dict(content)


def _strip(architecture: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in architecture.items() if key not in _NOT_ARCHITECTURE}


def _as_name(text: str) -> str:
    """Return a text as a name for records, tables and files."""
    return re.sub(r"[^\w.-]", "_", text)[:100] or "model"
