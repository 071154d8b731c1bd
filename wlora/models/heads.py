"""The head of a model: its modules and parameters, their initialisation, and the classes of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from wlora.models.architectures import order_classes
from wlora.tasks.class_weights import class_losses

AUTO: dict[str, Any] = {
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "seq2seq": AutoModelForSeq2SeqLM,
}
"""transformers' class for every kind of head (`Task.head`)."""

HEAD_NAMES = ("pooler", "classifier", "classification_head", "score", "qa_outputs")
# The output embeddings of text generation; tied to the input embeddings in most families, and never trained.
LM_HEAD = "lm_head"


def make_config(architecture: Mapping[str, Any], *, num_labels: int) -> PretrainedConfig:
    """Return transformers' configuration of an architecture, without the classes and the loss of an earlier training.

    Raises:
        Exception: transformers rejects a value; the class depends on the value.
    """
    left_out = ("model_type", "id2label", "label2id", "problem_type")
    settings = {key: value for key, value in architecture.items() if key not in left_out}
    return AutoConfig.for_model(architecture["model_type"], **settings, num_labels=num_labels)


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of head and pooler, by name. Every method trains them, except with `compat=release`.

    These are the children of the model other than the bare model and the output embeddings, and the pooler of the bare
    model.
    """
    base = getattr(model, "base_model", model)
    beside = {name for name, child in model.named_children() if base is not model and child is not base and name != LM_HEAD}
    return {
        name: module
        for name, module in model.named_modules()
        if name in beside or (name.rpartition(".")[2] in HEAD_NAMES and not name.rpartition(".")[0].count("."))
        if next(module.parameters(), None) is not None
    }


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of head and pooler, by name."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in head_modules(model).items()
        for name, parameter in module.named_parameters()
    }


def start_head(model: PreTrainedModel, fresh: list[str], seed: int) -> None:
    """Initialise parameters of the head as the model's family does, from a separate seed. Nothing else changes."""
    torch.manual_seed(seed)
    for prefix, module in head_modules(model).items():
        for inner, part in module.named_modules():
            path = f"{prefix}.{inner}".rstrip(".")
            own = dict(part.named_parameters(recurse=False))
            if not any(f"{path}.{name}" in fresh for name in own):
                continue
            for name, parameter in own.items():
                # Create a new parameter: transformers does not initialise loaded ones, and other models may share the old.
                setattr(part, name, nn.Parameter(torch.empty_like(parameter), requires_grad=False))
            model._init_weights(part)
            for name, parameter in own.items():
                if f"{path}.{name}" not in fresh:
                    getattr(part, name).data.copy_(parameter.data)


def reorder_head(model: PreTrainedModel, labels: Sequence[str]) -> None:
    """Reorder the outputs of a kept classification head to the order of the task's classes (`order_classes`)."""
    order = order_classes(model.config.to_dict(), labels, where=f"model.path={model.config.name_or_path}")
    output = [part for module in head_modules(model).values() for part in module.modules() if isinstance(part, nn.Linear)][
        -1
    ]
    for parameter in output.parameters():
        parameter.data = parameter.data[order]


def name_classes(model: PreTrainedModel, labels: Sequence[str], *, head: str, several: bool = False) -> None:
    """Write the classes of the outputs and the kind of loss into a model's configuration, replacing older entries.

    Args:
        labels: the task's classes in the order of the outputs; none for regression and for other heads.
        head: the kind of head.
        several: whether a row may have any number of classes; this determines the loss.
    """
    names = list(labels) or [f"LABEL_{number}" for number in range(model.config.num_labels)]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    if head == "sequence_classification":
        one = "single_label_classification" if labels else "regression"
        model.config.problem_type = "multi_label_classification" if several else one


def weigh_classes(model: PreTrainedModel, weights: Sequence[float]) -> None:
    """Weight the classes in the training loss: the loss becomes the mean over rows of weight times cross-entropy.

    In evaluation mode, the model's own unweighted loss is used.

    Args:
        model: a model with a classification head; `loss` in its outputs is replaced.
        weights: the weight of each class. If their mean over the training rows is 1, the scale of the loss does not change.
    """

    def reweigh(_: nn.Module, args: Any, inputs: dict[str, Any], outputs: Any) -> Any:
        if model.training and inputs.get("labels") is not None:
            outputs.loss = class_losses(outputs.logits.float(), inputs["labels"], weights).mean()
        return outputs

    model.register_forward_hook(reweigh, with_kwargs=True)
