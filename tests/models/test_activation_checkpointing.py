"""Gradient checkpointing: the same losses from fewer kept activations, and the backward pass still ends where it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.conftest import TINY, compose
from tests.support.conf_files import FITTING, whole_runs
from wlora.config.identity import run_id, scientific_fields
from wlora.experiment.build import assemble
from wlora.methods.base import Method
from wlora.methods.registry import build_method
from wlora.models.loading import checkpoint_activations, load_model
from wlora.models.source import ModelSource
from wlora.models.targets import find_layout, list_targets
from wlora.models.tokenizer import load_tokenizer

MODELS = ["tiny_bert", "tiny_deberta", "tiny_bart", "tiny_llama"]
OWN = {**FITTING, "flexora": ["method.held_out=16"]}  # of the few rows


class Rig:
    """A tiny model in training mode with dropout everywhere, and one adapter in the layer of the given index."""

    def __init__(self, name: str, *, keep: int, checkpointing: bool) -> None:
        config = compose("task=story_nli", f"model={name}", "method=lora", "rank=4", "dropout=0.1")
        source = ModelSource(None, None)
        self.tokenizer = load_tokenizer(config.model, source)
        self.model: PreTrainedModel = load_model(
            config.model, source, self.tokenizer, head="sequence_classification", num_labels=3, seed=0
        )
        self.method: Method = build_method(config.method)
        assemble(config, self.model, self.method)
        for adapter_name, adapter in self.method.adapters.items():
            nn.init.normal_(adapter.B, std=0.05, generator=torch.Generator().manual_seed(0))
            if self.method.adapters.target(adapter_name).layer != keep:
                self.method.adapters.disconnect(adapter_name)
        if checkpointing:
            checkpoint_activations(self.model)
        self.model.train()
        architecture = self.model.config.to_dict()
        depths = [(stack.prefix, len(stack.layers)) for stack in find_layout(architecture).stacks]
        names = [f"{prefix}.{index}" for prefix, depth in depths for index in range(depth)]
        self.layers = [self.model.get_submodule(name) for name in names]
        universe = list_targets(architecture, "all")
        self.linears = [[self._linear(t.name) for t in universe if t.layer == index] for index in range(len(names))]

    def _linear(self, name: str) -> nn.Module:
        module = self.model.get_submodule(name)
        return module.get_submodule("base") if name in self.method.adapters else module

    def step(self) -> tuple[float, dict[str, torch.Tensor]]:
        """Run forward and backward on a padded batch; returns loss and gradients."""
        texts = ["Anna went to the library.", "Ben took the ball. Clara left. " * 2, "Ben left."]
        batch = self.tokenizer(texts, ["Anna is in the library."] * 3, padding=True, return_tensors="pt")
        if self.model.config.model_type in ("bart", "llama"):
            batch.pop("token_type_ids")
        torch.manual_seed(3)
        loss = self.model(**batch, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        return loss.item(), {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_same_with_dropout(name: str) -> None:
    (plain, expected), (checkpointed, found) = (Rig(name, keep=0, checkpointing=on).step() for on in (False, True))
    assert plain == checkpointed and expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_below_the_lowest_adapter_is_computed_again_or_visited(name: str, checkpointing: bool) -> None:
    layers = 4 if name == "tiny_bart" else 2
    rig = Rig(name, keep=layers - 1, checkpointing=checkpointing)
    assert len(rig.layers) == layers
    calls, visited = [0] * layers, [False] * layers
    attached = []

    for index, (layer, linears) in enumerate(zip(rig.layers, rig.linears, strict=True)):

        def count(module: nn.Module, args: Any, index: int = index) -> None:
            calls[index] += 1

        def watch(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
            output = output[0] if isinstance(output, tuple) else output
            attached.append((index, output.requires_grad))
            if output.requires_grad:
                output.register_hook(lambda gradient: visited.__setitem__(index, True))

        linears[-1].register_forward_pre_hook(count)
        layer.register_forward_hook(watch)
    loss, gradients = rig.step()
    top = layers - 1
    assert attached == [(index, index == top) for index in range(layers)]
    assert visited == [index == top for index in range(layers)]
    # Checkpointing computes a layer a second time in the backward pass, and only one that is in it.
    assert calls == [2 if checkpointing and index == top else 1 for index in range(layers)]
    assert not rig.model.get_input_embeddings()._forward_hooks, "the embeddings' output is not made to require a gradient"
    assert any("adapter" in key for key in gradients)


def test_it_would_be_noticed_if_the_embeddings_were_made_to_require_a_gradient() -> None:
    rig = Rig("tiny_bert", keep=1, checkpointing=True)
    rig.model.enable_input_require_grads()
    calls: list[int] = []
    rig.linears[0][-1].register_forward_pre_hook(lambda module, args: calls.append(1))
    rig.step()
    assert len(calls) == 2


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", whole_runs())
def test_a_run_has_the_same_curve_and_identity(method: str, run_tiny: Any, tmp_path: Path) -> None:
    records, curves = [], []
    for on in ("false", "true"):
        words = [f"method={method}", "task.max_train_rows=64", "train.max_steps=16", "precision=fp32"]
        words += OWN.get(method, [])
        record = run_tiny(*words, f"train.gradient_checkpointing={on}", results=tmp_path / on)
        records.append(record)
        lines = (tmp_path / on / "records" / f"{record.run_id}.jsonl").read_text().splitlines()
        curves.append([json.loads(line) for line in lines])
    assert curves[0] == curves[1]
    assert records[0].run_id == records[1].run_id, "it decides no number"
    assert records[0].metrics == records[1].metrics and records[0].adapters == records[1].adapters


def test_the_key_is_not_part_of_the_identity() -> None:
    on, off = (compose(*TINY, f"train.gradient_checkpointing={word}") for word in ("true", "false"))
    ids = {run_id(scientific_fields(c, task_data="d", model_data="m", precision="fp32")) for c in (on, off)}
    assert len(ids) == 1
