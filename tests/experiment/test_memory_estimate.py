"""The memory that a dry run foresees is what a step then takes."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import compose
from wlora.config.schema import Config
from wlora.experiment.build import assemble, prepare_method
from wlora.experiment.dry_run import describe
from wlora.experiment.memory_estimate import Memory, estimate, tell
from wlora.methods.base import Steps
from wlora.models.first_token import first_token_alone
from wlora.models.source import READS_GGUF
from wlora.training.activation_memory import build_example, make_batch, saved_bytes
from wlora.training.precision import Precision, lower_base

STEPS = Steps(total=100, per_epoch=20)
SMALL = ["task.batch_size=8", "task.max_length=64"]


def measure(config: Config, precision: str, keep: slice | None = None) -> int:
    """Return the bytes of weights, gradients, moments and saved activations of a real step."""
    model = build_example(config, "cpu")
    method = prepare_method(config, None)
    assemble(config, model, method)
    names = list(method.adapters)
    for name in names if keep is not None else ():
        if name not in names[keep]:
            method.adapters.disconnect(name)
    lower_base(model, Precision(precision, ""))
    model.train()
    batch = make_batch(model, config)
    with first_token_alone(model):
        saved = saved_bytes(model, batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**batch).loss.backward()
    optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    return saved + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("story_nli", "tiny_bert"),
        ("story_nli", "tiny_deberta"),
        ("story_nli", "tiny_llama"),
        ("story_qa", "tiny_deberta"),
        ("story_summary", "tiny_bart"),
        ("story_nli", "minilm"),
    ],
)
def test_estimates_agree_with_what_is_measured(task: str, model: str, precision: str) -> None:
    if model in ("tiny_bart", "tiny_llama"):  # older ones save other tensors, and BART cannot be traced
        pytest.importorskip("transformers", minversion=READS_GGUF)
    config = compose(f"task={task}", f"model={model}", "method=wlora", "k=2", *SMALL)
    whole, highest, lowest = (memory.total for memory in estimate(config, Precision(precision, ""), STEPS))
    assert whole == pytest.approx(measure(config, precision), rel=0.15)
    assert highest == pytest.approx(measure(config, precision, slice(-2, None)), rel=0.15)
    assert lowest == pytest.approx(measure(config, precision, slice(0, 2)), rel=0.15)
    assert highest < lowest < whole


def test_full_fine_tuning_trains_the_base() -> None:
    config = compose("task=story_nli", "model=tiny_bert", "method=full", *SMALL)
    (memory,) = estimate(config, Precision("fp32", ""), STEPS)
    assert memory.frozen == 0 and memory.total == pytest.approx(measure(config, "fp32"), rel=0.15)


def test_gradient_checkpointing_keeps_less() -> None:
    plain, less = (
        estimate(compose("task=rte", "method=lora", f"train.gradient_checkpointing={on}"), Precision("bf16", ""), STEPS)[0]
        for on in ("false", "true")
    )
    assert less.activations < plain.activations / 3 and less.frozen == plain.frozen


def test_four_bits_take_a_quarter_of_sixteen_and_the_rest_stays() -> None:
    plain, packed = (
        estimate(compose("task=sst2", "model=llama3_8b", "method=lora", *SMALL, *words), Precision("bf16", ""), STEPS)[0]
        for words in ([], ["model.quantization=nf4"])
    )
    embeddings = 2 * 128256 * 4096
    body = plain.frozen - embeddings
    assert packed.frozen - embeddings == pytest.approx(body * (0.25 + 1 / 32), rel=0.01)
    assert packed.activations == plain.activations


def test_what_fits_is_said_of_both_sizes_before_and_after_the_cut() -> None:
    config = compose("task=rte")
    gib = 2**30
    lines = tell([Memory(36, gib, gib, 20 * gib), Memory(5, gib, gib, gib), Memory(5, gib, gib, 9 * gib)], config)
    assert lines[0].startswith("22.00 GiB with 36 adapters") and lines[1].startswith("3.00 to 11.00 GiB with 5 of them")
    assert lines[2] == "fits 80 GB; once cut to the highest layers, 16 GB, too"
    assert tell([Memory(36, 99 * gib, 0, 0)], config)[-1] == "fits neither 16 GB nor 80 GB"
    assert not Memory(1, int(14.5e9), 0, 0).fits(16), "a tenth is left free"


@pytest.mark.parametrize("words", [["task=rte"], ["task=xsum", "model=bart_large"], ["task=sst2", "model=llama3_8b"]])
def test_a_dry_run_tells_of_the_papers_models(words: list[str], tmp_path: object) -> None:
    if "model=bart_large" in words:
        pytest.importorskip("transformers", minversion=READS_GGUF)
    text = describe(compose(*words, f"results_dir={tmp_path}"))
    assert "memory     " in text and "GiB with" in text and " fits " in text
