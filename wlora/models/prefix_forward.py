"""Compute or skip the lowest layers of a model. Below the lowest adapter their outputs do not change during training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wlora.models.discovery import layout_of
from wlora.models.first_token import every_token
from wlora.models.heads import LM_HEAD, head_modules, head_parameters

# Described families whose layers return (hidden states, attention weights). For others, the first pass determines this.
_RETURN_PAIRS = ("deberta-v2",)
_LAYERDROP = ("encoder_layerdrop", "layerdrop")
# Largest difference of logits between the whole model and one that skips layers, relative to the largest logit.
_TOLERANCE = 1e-4
# Keys of a configuration that do not affect the computation of the body.
_NAMES = ("transformers_version", "architectures", "id2label", "label2id", "problem_type", "name_or_path", "dtype")


class _Reached(Exception):
    """The last layer of the prefix has finished; the layers above it need not run."""


def frozen_depth(model: PreTrainedModel) -> int:
    """Return how many layers of a model's first stack, from the lowest upwards, neither train nor have an adapter.

    The first stack is the encoder of an encoder-decoder, and all layers of most other families. The result is 0 if any
    parameter below them trains, or if layers are skipped at random (LayerDrop), because then their outputs are not fixed.
    """
    _, *others = layout_of(model).stacks
    above = {id(p) for p in head_parameters(model).values()}
    for stack in others:
        above |= {id(p) for p in model.get_submodule(stack.prefix).parameters()}
    layers = _layers(model)
    inside = {id(p) for p in layers.parameters()}
    beneath = [p for p in model.parameters() if p.requires_grad and id(p) not in above | inside]
    if beneath or any(getattr(model.config, key, 0) > 0 for key in _LAYERDROP):
        return 0
    for index, layer in enumerate(layers):
        # Adapted modules are marked by `adapts`, even if their adapter does not train at the moment.
        adapted = any(getattr(module, "adapts", False) for module in layer.modules())
        if adapted or any(p.requires_grad for p in layer.parameters()):
            return index
    return len(layers)


class Prefix:
    """The lowest `depth` layers of a model, in evaluation mode: compute only them, or skip them.

    Names and parameters of the model do not change.

    Args:
        model: the bare model.
        depth: 1 to the number of layers of the first stack, as in `frozen_depth`.
    """

    def __init__(self, model: PreTrainedModel, depth: int) -> None:
        self.model, self.depth = model, depth
        self._skipped = list(_layers(model))[:depth]
        # Number of values that a layer returns besides the hidden states; None if it returns a tensor alone.
        self._besides = 1 if model.config.model_type in _RETURN_PAIRS else None

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        config = self.model.config
        return int(getattr(config, "d_model", None) or config.hidden_size)

    @torch.no_grad()
    def compute(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the hidden states after the prefix, [rows, tokens, width]. No random numbers are drawn."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            self._besides = len(output) - 1 if isinstance(output, tuple) else None
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        training = self.model.training
        self.model.eval()
        handle = self._skipped[-1].register_forward_hook(stop)
        try:
            with every_token(self.model):
                self.model(**inputs)
        except _Reached:
            pass
        finally:
            handle.remove()
            self.model.train(training)
        return found[0]

    @contextmanager
    def replaced(self, states: Tensor) -> Iterator[None]:
        """Within this block, the model skips the prefix and continues from given hidden states, [rows, tokens, width].

        The embeddings still run; their output is ignored.
        """

        def passed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden_states if self._besides is None else (hidden_states, *[None] * self._besides)

        def given(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return passed(states.to(hidden_states.dtype))

        for layer in self._skipped:
            layer.forward = passed
        self._skipped[-1].forward = given
        try:
            yield
        finally:
            for layer in self._skipped:
                del layer.forward

    @torch.no_grad()
    def reproduces(self, inputs: dict[str, Tensor]) -> bool:
        """Tell whether the model gives the same logits from given hidden states as from the beginning.

        This is known for described families. A discovered family is tested with a forward pass, because its layers may pass
        on more than hidden states (T5's positions), or run several times (ALBERT).

        Args:
            inputs: a batch of the model's inputs.
        """
        if layout_of(self.model).described:
            return True
        training = self.model.training
        self.model.eval()
        try:
            states = self.compute(inputs).masked_fill(~inputs["attention_mask"].bool().unsqueeze(-1), 0)
            whole = self.model(**inputs)
            with self.replaced(states):
                skipping = self.model(**inputs)
        except (TypeError, AttributeError, IndexError):  # the layers have other inputs or outputs
            return False
        finally:
            self.model.train(training)
        pairs = [(whole[key], skipping[key]) for key in whole if key.endswith("logits")]
        return all(float((a - b).abs().max()) <= _TOLERANCE * float(a.abs().max()) for a, b in pairs)

    def fingerprint(self) -> str:
        """Return a hash of everything the prefix depends on: its weights, the weights below it, and the architecture."""
        stack, *others = layout_of(self.model).stacks
        above = [*head_modules(self.model), *(other.prefix for other in others), LM_HEAD]
        above += [f"{stack.prefix}.{index}" for index in range(self.depth, len(_layers(self.model)))]
        architecture = {k: v for k, v in self.model.config.to_dict().items() if k not in _NAMES and k[0] != "_"}
        digest = hashlib.sha256(f"{self.depth} {json.dumps(architecture, sort_keys=True, default=str)}".encode())
        for name, value in self.model.state_dict().items():
            if isinstance(value, Tensor) and not any(name.startswith(f"{prefix}.") for prefix in above):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.get_submodule(layout_of(model).stacks[0].prefix)
    assert isinstance(layers, nn.ModuleList)
    return layers
