"""The last layer behind its attention: run for the first token alone, heads that read no other give the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertIntermediate

from tests.conftest import compose
from tests.models.test_prefix_forward import Rig
from wlora.methods.lora_drop import LoRADrop
from wlora.methods.training_data import TrainingData
from wlora.models.first_token import every_token, first_token_alone
from wlora.models.loading import build_unloaded, checkpoint_activations
from wlora.models.prefix_forward import Prefix
from wlora.storage.records import Record


class Watch:
    """The tokens that a model's feed-forward parts see, by layer."""

    def __init__(self, model: nn.Module) -> None:
        self.tokens: dict[int, int] = {}
        for layer, part in enumerate(m for n, m in model.named_modules() if n.endswith("intermediate.dense")):
            part.register_forward_pre_hook(lambda _, args, layer=layer: self.tokens.update({layer: args[0].shape[1]}))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["tiny_bert", "tiny_deberta"])
def test_logits_and_gradients_are_the_same_and_one_token_runs(name: str, checkpointing: bool) -> None:
    rig = Rig(name)
    if checkpointing:
        checkpoint_activations(rig.model)
    rig.model.eval()
    watch, length = Watch(rig.model), rig.batch["input_ids"].shape[1]
    expected = rig.model(**rig.batch)
    expected.loss.backward()
    whole = gradients(rig.model)
    assert set(watch.tokens.values()) == {length}
    with first_token_alone(rig.model):
        found = rig.model(**rig.batch)
        found.loss.backward()
    assert watch.tokens == {0: length, 1: 1}
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    short = gradients(rig.model)
    assert short.keys() == whole.keys() and len(short) > 12
    for key, gradient in whole.items():
        torch.testing.assert_close(short[key], gradient, rtol=1e-4, atol=1e-6)
    assert torch.equal(rig.model(**rig.batch).logits, expected.logits) and watch.tokens == {0: length, 1: length}


@pytest.mark.parametrize("name", ["tiny_bart", "tiny_llama"])
def test_families_whose_heads_read_another_token_run_as_they_were(name: str) -> None:
    rig = Rig(name)
    rig.model.eval()
    expected = rig.model(**rig.batch).logits
    with first_token_alone(rig.model), every_token(rig.model):
        assert torch.equal(rig.model(**rig.batch).logits, expected)


@pytest.mark.parametrize(
    ("head", "changed"),
    [
        ("question_answering", {}),
        ("sequence_classification", {"chunk_size_feed_forward": 2}),
        ("sequence_classification", {"conv_kernel_size": 3, "num_hidden_layers": 1}),
    ],
)
def test_what_needs_the_whole_sequence_gets_it(head: str, changed: dict[str, int]) -> None:
    config = compose("task=story_nli", "model=tiny_bert" if "chunk_size_feed_forward" in changed else "model=tiny_deberta")
    architecture = {"vocab_size": 50, **config.model.architecture, **changed}
    model = build_unloaded(config.model, architecture, head=head, num_labels=2, device="cpu").eval()
    watch = Watch(model)
    with first_token_alone(model):
        model(input_ids=torch.full((2, 8), 7), attention_mask=torch.ones(2, 8, dtype=torch.int64))
    assert set(watch.tokens.values()) == {2 if "chunk_size_feed_forward" in changed else 8}


def test_lora_drop_and_a_prefix_of_all_layers_see_every_token() -> None:
    rig = Rig("tiny_bert", "lora_drop")
    assert isinstance(rig.method, LoRADrop)
    data = TrainingData(rig.model, lengths=[1] * 3, labels=[0, 1, 2], collate=lambda rows: rig.batch)
    rig.method.stage_steps = 1
    rig.method.phases(data, 2)
    expected, states = rig.method.importance(), Prefix(rig.model, 2).compute(rig.batch)
    with first_token_alone(rig.model):
        assert rig.method.importance() == expected
        assert torch.equal(Prefix(rig.model, 2).compute(rig.batch), states)


def test_runs_train_and_evaluate_with_it(run_tiny: Callable[..., Record], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    forward = BertIntermediate.forward

    def watched(module: BertIntermediate, hidden_states: Tensor) -> Tensor:
        seen.append((module.training, hidden_states.shape[1]))
        return forward(module, hidden_states)

    monkeypatch.setattr(BertIntermediate, "forward", watched)
    run_tiny("method=lora", "train.max_steps=16")
    for training in (True, False):
        tokens = [tokens for mode, tokens in seen if mode is training]
        assert tokens and set(tokens[1::2]) == {1} and min(tokens[::2]) > 1
    stored = run_tiny("method=probe", "train.max_steps=16", "train.prefix_cache=memory")
    assert stored.memory["prefix_layers"] == 2
