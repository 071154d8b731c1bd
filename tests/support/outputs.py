"""What comes out of a model and of a run: logits of two texts, the losses of a learning curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

TEXTS = ["Anna went to the library.", "Ben took the lamp to the garden. Anna is in the school."]


def logits(model: Any, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the logits of two texts in evaluation mode."""
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    if model.config.is_encoder_decoder:
        inputs.pop("token_type_ids", None)
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    return found


def losses(results: Path, run_id: str) -> list[float]:
    """Return the training losses of a run's learning curve."""
    points = [json.loads(line) for line in (results / "records" / f"{run_id}.jsonl").read_text().splitlines()]
    return [point["loss"] for point in points if "loss" in point]
