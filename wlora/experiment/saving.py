"""What a run has trained, on disk: its adapters in PEFT's format, or the whole model as a plain transformers folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from wlora.adapters.peft_format import write_adapter
from wlora.errors import RunFault
from wlora.models.heads import head_modules
from wlora.models.loading import quiet
from wlora.storage.atomic_write import Put, put, staged

if TYPE_CHECKING:
    from wlora.methods.base import Method


def model_folder(results_dir: str | Path, run_id: str) -> Path:
    """Return where a run's model stands."""
    return Path(results_dir) / "models" / run_id


def adapter_folder(results_dir: str | Path, run_id: str) -> Path:
    """Return where a run's adapters stand."""
    return Path(results_dir) / "adapters" / run_id


def save_adapter(model: PreTrainedModel, method: Method, folder: Path, *, kind: str, put: Put = put) -> dict[str, str]:
    """Write a trained model's adapters and head as a PEFT folder, whole or not at all (`train.save_adapter`).

    Args:
        folder: is replaced where it exists.
        kind: the kind of head (`Task.head`).
        put: moves the folder to its place.

    Returns:
        What the record's `model` says of the two files; nothing if the method has no adapters or none is left.

    Raises:
        RunFault: the disk is full or the folder cannot be written; an older folder stays.
    """
    described = method.to_peft()
    if described is None:
        return {}
    config, tensors = described
    config["base_model_name_or_path"] = model.config.name_or_path or None
    config["revision"] = getattr(model.config, "_commit_hash", None)
    with replacing(folder, put) as staging:
        return write_adapter(staging, config, tensors, head_modules(model), kind=kind)


def save_model(
    model: PreTrainedModel, method: Method, tokenizer: PreTrainedTokenizerBase, folder: Path, put: Put = put
) -> None:
    """Fold a trained model's adapters into its weights and write it with its tokenizer, whole or not at all.

    It is folded and written in float32, whatever its base was run in, so that nothing of the adapters is rounded away.
    Of an encoder-decoder the settings of its generation go along as the run left them. The model is used up.

    Args:
        model: on any device; it ends on the CPU.
        method: the policy whose adapters it carries.
        tokenizer: goes into the folder, too.
        folder: is replaced where it exists.
        put: moves the folder to its place.

    Raises:
        RunFault: the disk is full or the folder cannot be written; an older folder stays.
    """
    model.to(device=torch.device("cpu"), dtype=torch.float32)
    method.fold()
    with replacing(folder, put) as staging:
        write_model(model, tokenizer, staging)


@contextmanager
def replacing(folder: Path, put: Put = put) -> Iterator[Path]:
    """Give out a folder to be made and filled, which then takes the other's place; a failure leaves nothing of it.

    Raises:
        RunFault: the disk is full or the folder cannot be written.
    """
    try:
        with staged(folder) as staging:
            yield staging
            put(staging, folder)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise RunFault(f"{folder} cannot be written ({reason}); an older one stays, and so does the run's record") from error


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain model with its tokenizer; of one that generates also the settings that it generates by."""
    generation = model.generation_config if model.can_generate() else None
    if generation is not None:
        # transformers writes no settings that it would warn of, such as one beam beside the model's own early stopping,
        # and then no weights either.
        model.generation_config = GenerationConfig()
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")
