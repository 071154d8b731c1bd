"""Saving the result of a run: its adapters in PEFT's format, or the whole model as a plain transformers folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from wlora.adapters.peft_format import make_uniform, write_adapter
from wlora.errors import RunFault
from wlora.models.heads import head_modules
from wlora.models.loading import quiet
from wlora.storage.atomic_write import Put, put, staged

if TYPE_CHECKING:
    from wlora.methods.base import Method


def model_folder(results_dir: str | Path, run_id: str) -> Path:
    """Return the folder of a run's saved model."""
    return Path(results_dir) / "models" / run_id


def adapter_folder(results_dir: str | Path, run_id: str) -> Path:
    """Return the folder of a run's saved adapters."""
    return Path(results_dir) / "adapters" / run_id


def save_adapter(
    model: PreTrainedModel, method: Method, folder: Path, *, kind: str | None, put: Put = put, compact: bool = True
) -> dict[str, str]:
    """Write the adapters and head of a trained model atomically as a PEFT folder (`train.save_adapter`).

    Args:
        model: the trained model.
        method: the method whose adapters are saved.
        folder: target folder; it is replaced if it exists.
        kind: the kind of head (`Task.head`); None for other kinds.
        put: moves the finished folder to its final path.
        compact: true: every adapter keeps its own rank and alpha; false: all have one rank and one scale (`make_uniform`).

    Returns:
        Hashes of the two compact files for the record's `model`; empty if the method has no adapters or none is left.

    Raises:
        RunFault: the disk is full or the folder cannot be written; an existing folder is kept.
    """
    described = method.to_peft()
    if described is None:
        return {}
    config, tensors = described
    config["base_model_name_or_path"] = model.config.name_or_path or None
    config["revision"] = getattr(model.config, "_commit_hash", None)
    with replacing(folder, put) as staging:
        written = write_adapter(staging, config, tensors, head_modules(model), kind=kind)
        if not compact:
            make_uniform(staging)
        return written


def save_model(
    model: PreTrainedModel, method: Method, tokenizer: PreTrainedTokenizerBase, folder: Path, put: Put = put
) -> None:
    """Merge the adapters of a trained model into its weights and write it atomically with its tokenizer.

    Merging and saving use float32, independent of the precision of the base, so that the adapters are not rounded. For an
    encoder-decoder the generation settings of the run are saved, too. The model is modified and must not be used afterwards.

    Args:
        model: the trained model on any device; it is moved to the CPU.
        method: the method whose adapters are merged.
        tokenizer: tokenizer to save in the same folder.
        folder: target folder; it is replaced if it exists.
        put: moves the finished folder to its final path.

    Raises:
        RunFault: the disk is full or the folder cannot be written; an existing folder is kept.
    """
    model.to(device=torch.device("cpu"), dtype=torch.float32)
    method.fold()
    with replacing(folder, put) as staging:
        write_model(model, tokenizer, staging)


@contextmanager
def replacing(folder: Path, put: Put = put) -> Iterator[Path]:
    """Context manager: yield a temporary folder path to fill; it then replaces `folder`. After an error it is removed.

    Raises:
        RunFault: the disk is full or the folder cannot be written.
    """
    try:
        with staged(folder) as staging:
            yield staging
            put(staging, folder)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise RunFault(f"{folder} cannot be written ({reason}); an older folder and the run's record are kept") from error


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain model with its tokenizer and, if it can generate texts, its generation settings."""
    generation = model.generation_config if model.can_generate() else None
    if generation is not None:
        # transformers refuses to save the model if it considers the generation settings inconsistent, for example one beam
        # with early stopping. Therefore default settings are saved first, and the real ones are written below.
        model.generation_config = GenerationConfig()
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")
