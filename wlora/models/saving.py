"""Trained models as plain transformers folders, which `model.path` takes (`train.save_model`)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from wlora.errors import RunFault
from wlora.models.loading import quiet

if TYPE_CHECKING:
    from wlora.methods.base import Method


def model_folder(results_dir: str | Path, run_id: str) -> Path:
    """Return where a run's model stands."""
    return Path(results_dir) / "models" / run_id


def save_model(model: PreTrainedModel, method: Method, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Fold a trained model's adapters into its weights and write it with its tokenizer, whole or not at all.

    It is folded and written in float32, whatever its base was run in, so that nothing of the adapters is rounded away.
    Of an encoder-decoder the settings of its generation go along as the run left them. The model is used up.

    Args:
        model: on any device; it ends on the CPU.
        method: the policy whose adapters it carries.
        tokenizer: goes into the folder, too.
        folder: is replaced where it exists.

    Raises:
        RunFault: the disk is full or the folder cannot be written; an older folder stays.
    """
    model.to(device=torch.device("cpu"), dtype=torch.float32)
    method.fold()
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        try:
            _write(model, tokenizer, staging)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise RunFault(
            f"the model cannot be written to {folder} ({error.strerror or error}); the run's record stands"
        ) from error


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
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
