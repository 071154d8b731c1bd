"""The losses of single rows, which packed sweeps use, have the mean that a model's own forward pass returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.conftest import compose
from wlora.config.schema import TaskConfig
from wlora.models.heads import name_classes, weigh_classes
from wlora.models.loading import load_model
from wlora.models.source import locate
from wlora.models.tiny import build_tokenizer
from wlora.tasks.base import build_task

ONE = {"text": ["Anna left.", "Ben went to the library.", "Clara."], "label": [0, 1, 1]}
KINDS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "classification": ({"labels": ["a", "b"]}, ONE),
    "weighted": ({"kind": "classification", "labels": ["a", "b"], "class_weights": "balanced"}, ONE),
    "multi_label": (
        {"labels": ["a", "b"], "metrics": ["micro_f1"], "primary_metric": "micro_f1"},
        ONE | {"label": [[0], [0, 1], []]},
    ),
    "token_classification": (
        {"labels": ["B-X", "O"], "metrics": ["f1"], "primary_metric": "f1"},
        {"text": [["Anna", "left"], ["Ben"], ["Clara", "went", "."]], "label": [[0, 1], [0], [0, 1, 1]]},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_row_losses_is_the_loss_of_the_model(kind: str) -> None:
    fields, columns = KINDS[kind]
    known: dict[str, Any] = {"name": kind, "kind": kind, "benchmark": "table", "columns": ["text"], "validation": ["v"]}
    known |= {"metrics": ["accuracy"], "primary_metric": "accuracy"}
    task, tokenizer = build_task(TaskConfig(**(known | fields))), build_tokenizer()
    config = compose("task=story_nli", "model=tiny_bert").model
    model = load_model(config, locate(config), tokenizer, head=task.head, num_labels=task.num_labels, seed=0)
    name_classes(model, ["a", "b"], head=task.head, several=kind == "multi_label")
    features = task.encode(Dataset.from_dict(columns), tokenizer, training=True)
    if getattr(task, "class_weights", None):
        weigh_classes(model, task.class_weights)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    batch = task.collate(features.rows([0, 1, 2]), tokenizer)
    weights = torch.tensor(features.loss_weights, dtype=torch.float32)
    rows = task.row_losses(model, batch)
    torch.testing.assert_close((rows * weights).sum() / weights.sum(), model(**batch).loss)
    if kind == "weighted":
        model.eval()
        torch.testing.assert_close(model(**batch).loss, task.row_losses(model, batch).mean())
        assert task.class_weights == pytest.approx([1.5, 0.75])
