"""The frozen prefix: left out, the model gives the same; stored, runs give the same, whatever befalls the files."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import compose
from tests.support.outputs import losses
from wlora.config.identity import run_id, scientific_fields
from wlora.data.features import Features
from wlora.experiment.build import assemble
from wlora.methods.alora import ALoRA
from wlora.methods.registry import build_method
from wlora.methods.training_data import TrainingData
from wlora.models.loading import load_model
from wlora.models.prefix_forward import Prefix, frozen_depth
from wlora.models.source import ModelSource
from wlora.models.tokenizer import load_tokenizer
from wlora.storage.records import Record
from wlora.training.interruption import Interrupted
from wlora.training.prefix_cache import PrefixCache

MODELS = ["tiny_bert", "tiny_deberta", "tiny_bart", "tiny_llama"]
# A price on depth keeps the cut off the lowest layer: ω hardly moves in so few steps.
WLORA = ["method=wlora_depth", "k=2", "method.depth_cost=0.5", "method.select_steps=8", "precision=fp32", "dropout=0"]
NO_DROPOUT = {
    "tiny_bert": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
    "tiny_deberta": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
    "tiny_bart": ["dropout", "attention_dropout", "activation_dropout"],
    "tiny_llama": ["attention_dropout"],
}


def no_dropout(name: str) -> list[str]:
    return [f"model={name}", *(f"+model.architecture.{key}=0.0" for key in NO_DROPOUT[name])]


class Rig:
    """A tiny model with adapters in the highest encoder layer alone, and a padded batch."""

    def __init__(self, name: str, method: str = "lora") -> None:
        config = compose("task=story_nli", f"model={name}", f"method={method}", "rank=4")
        tokenizer = load_tokenizer(config.model, ModelSource(None, None))
        self.model = load_model(
            config.model, ModelSource(None, None), tokenizer, head="sequence_classification", num_labels=3, seed=0
        )
        self.method = build_method(config.method)
        assemble(config, self.model, self.method)
        torch.manual_seed(1)
        for adapter in self.method.adapters.values():
            torch.nn.init.normal_(adapter.B, std=0.05)
        texts = ["Anna went to the library.", "Ben took the ball. Clara left. " * 2, "Ben left."]
        self.batch = dict(tokenizer(texts, ["Anna is in the library."] * 3, padding=True, return_tensors="pt"))
        if self.model.config.model_type in ("bart", "llama"):
            self.batch.pop("token_type_ids", None)
        self.batch["labels"] = torch.tensor([0, 1, 2])

    def keep(self, layer: int) -> None:
        """Disconnect all adapters but those of one layer."""
        for name in self.method.adapters:
            if self.method.adapters.target(name).layer != layer:
                self.method.adapters.disconnect(name)


@pytest.mark.parametrize("name", MODELS)
def test_depth_is_that_of_the_lowest_adapter_and_of_the_whole_encoder_at_most(name: str) -> None:
    rig = Rig(name)
    assert frozen_depth(rig.model) == 0
    rig.keep(1)
    assert frozen_depth(rig.model) == 1
    rig.keep(99)
    whole = rig.model.config.num_hidden_layers if name != "tiny_bart" else rig.model.config.encoder_layers
    assert frozen_depth(rig.model) == whole
    next(iter(rig.model.get_input_embeddings().parameters())).requires_grad_(True)
    assert frozen_depth(rig.model) == 0


@pytest.mark.parametrize("name", MODELS)
def test_the_model_gives_the_same_without_its_prefix(name: str) -> None:
    rig = Rig(name)
    rig.keep(1)
    rig.model.eval()
    expected = rig.model(**rig.batch)
    expected.loss.backward()
    gradients = {n: p.grad for n, p in rig.model.named_parameters() if p.grad is not None}
    rig.model.zero_grad()

    prefix = Prefix(rig.model, 1)
    states = prefix.compute(rig.batch)
    poisoned = {**rig.batch, "input_ids": torch.full_like(rig.batch["input_ids"], 5)}
    if name in ("tiny_bart", "tiny_llama"):
        poisoned = rig.batch  # they read token numbers beside the embeddings: ends of texts, the decoder's inputs
    with prefix.replaced(states):
        found = rig.model(**poisoned)
        found.loss.backward()
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(p.grad, gradients[n]) for n, p in rig.model.named_parameters() if p.grad is not None)
    with prefix.replaced(states + 1):
        assert not torch.allclose(rig.model(**rig.batch).logits, expected.logits)
    assert torch.equal(rig.model(**rig.batch).logits, expected.logits)


def test_computing_the_prefix_draws_nothing_and_leaves_the_mode() -> None:
    rig = Rig("tiny_bert")
    rig.model.train()
    before = torch.get_rng_state()
    Prefix(rig.model, 2).compute(rig.batch)
    assert torch.equal(torch.get_rng_state(), before) and all(module.training for module in rig.model.modules())


@pytest.mark.parametrize("name", ["tiny_deberta", "tiny_bart"])
def test_alora_scores_the_same_from_where_a_component_acts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(name, "alora")
    assert isinstance(rig.method, ALoRA)
    data = TrainingData(rig.model, lengths=[1] * 3, labels=None, collate=lambda rows: rig.batch)
    found = rig.method.ablation_scores(data, rig.batch)
    monkeypatch.setattr(TrainingData, "entering", lambda self, layer, batch: contextlib.nullcontext)
    assert found == rig.method.ablation_scores(data, rig.batch)


@pytest.mark.parametrize("name", MODELS)
def test_without_dropout_losses_are_the_same(name: str, run_tiny: Callable[..., Record], tmp_path: Path) -> None:
    plain = run_tiny(*WLORA, *no_dropout(name), results=tmp_path / "a")
    stored = run_tiny(
        *WLORA, *no_dropout(name), "train.prefix_cache=memory", "train.prefix_cache_dtype=fp32", results=tmp_path / "b"
    )
    if "prefix_layers" not in stored.memory:
        pytest.fail(f"nothing was left out: {stored.adapters}")
    assert losses(tmp_path / "b", stored.run_id) == pytest.approx(losses(tmp_path / "a", plain.run_id), rel=1e-5)
    assert stored.metrics == pytest.approx(plain.metrics, rel=1e-4) and stored.adapters == plain.adapters
    assert stored.run_id != plain.run_id


def test_memory_and_disk_are_one_run_and_the_dtype_is_another() -> None:
    def identity(*words: str) -> str:
        config = compose("task=rte", *words)
        return run_id(scientific_fields(config, task_data=None, model_data=None, precision="fp32"))

    off, memory, disk, exact = (
        identity(*words)
        for words in (
            ["train.prefix_cache_dtype=fp32", "train.prefix_cache_gb=1"],
            ["train.prefix_cache=memory", "train.prefix_cache_gb=1"],
            ["train.prefix_cache=disk"],
            ["train.prefix_cache=disk", "train.prefix_cache_dtype=fp32"],
        )
    )
    assert off == identity() and memory == disk and len({off, memory, exact}) == 3


def same(a: Record, b: Record) -> bool:
    return (a.metrics, a.adapters, a.events) == (b.metrics, b.adapters, b.events)


def test_disk_gives_what_memory_gives_and_is_used_again(
    run_tiny: Callable[..., Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = run_tiny(*WLORA, "train.prefix_cache=memory", results=tmp_path / "a")
    disk = run_tiny(*WLORA, "train.prefix_cache=disk", results=tmp_path / "b")
    assert same(memory, disk)
    assert "using the stored states in" not in capsys.readouterr().out
    assert same(memory, run_tiny(*WLORA, "train.prefix_cache=disk", "force=true", results=tmp_path / "b"))
    assert capsys.readouterr().out.count("using the stored states in") == 2  # the training rows and the validation split
    other = run_tiny(*WLORA, "train.prefix_cache=disk", "task.max_length=12", results=tmp_path / "b")
    assert not same(memory, other) and "using the stored states in" not in capsys.readouterr().out


def test_a_limit_changes_nothing_but_what_is_stored(
    run_tiny: Callable[..., Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_tiny(*WLORA, "train.prefix_cache=memory", results=tmp_path / "a")
    part = run_tiny(*WLORA, "train.prefix_cache=memory", "train.prefix_cache_gb=1e-4", results=tmp_path / "b")
    assert "the other rows are recomputed" in capsys.readouterr().out
    assert 0 < part.memory["prefix_bytes"] <= 1e-4 * 2**30 < whole.memory["prefix_bytes"]
    assert part.metrics == pytest.approx(whole.metrics, rel=1e-3) and part.run_id == whole.run_id


def test_runs_that_store_the_same_at_once_do_not_take_it_from_each_other(
    run_tiny: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_tiny(*WLORA, "train.prefix_cache=memory", results=tmp_path / "a")
    compute, written = PrefixCache._compute, list[int]()

    def overtaken(self: PrefixCache, features: Features, rows: list[int]) -> Iterator[torch.Tensor]:
        """Let another run begin after this one and end before it."""
        yield from compute(self, features, rows)
        with monkeypatch.context() as patch:
            patch.setattr(PrefixCache, "_compute", compute)
            PrefixCache(self.prefix, self.storage, self._collate).prepare("faster", features)
        (folder,) = (f for f in self.storage.folder.glob("[!.]*") if f.stat().st_ino not in written)
        written.append(folder.stat().st_ino)

    monkeypatch.setattr(PrefixCache, "_compute", overtaken)
    assert same(expected, run_tiny(*WLORA, "train.prefix_cache=disk", results=tmp_path / "b"))
    left = [path.stat().st_ino for path in (tmp_path / "b" / "prefix_cache").iterdir()]
    assert len(written) == 2 and sorted(left) == sorted(written)


@pytest.mark.parametrize("when", ["while it is written", "once it is mapped"])
def test_a_folder_that_is_removed_in_the_middle_costs_no_run(
    when: str, run_tiny: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WLORA, "task.max_train_rows=64", "train.max_steps=10"]
    expected = run_tiny(*words, "train.prefix_cache=memory", results=tmp_path / "a")
    name = "_compute" if when == "while it is written" else "_open"
    act, removed = getattr(PrefixCache, name), list[str]()

    def remove(self: PrefixCache) -> None:
        removed.extend(path.name for path in self.storage.folder.iterdir())
        shutil.rmtree(self.storage.folder)

    def compute(self: PrefixCache, features: Features, rows: list[int]) -> Iterator[torch.Tensor]:
        yield from act(self, features, rows)
        remove(self)

    def opened(self: PrefixCache, features: Features, rows: list[int], tokens: int) -> torch.Tensor:
        states: torch.Tensor = act(self, features, rows, tokens)
        remove(self)
        return states

    monkeypatch.setattr(PrefixCache, name, compute if name == "_compute" else opened)
    assert same(expected, run_tiny(*words, "train.prefix_cache=disk", results=tmp_path / "b")) and len(removed) == 2


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["states.bin", "manifest.json"])
def test_a_damaged_file_is_told_of_and_computed_anew(
    name: str, damage: str, run_tiny: Callable[..., Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WLORA, "train.prefix_cache=disk", "task.max_train_rows=64"]
    expected = run_tiny(*words)
    files = sorted((tmp_path / "prefix_cache").glob(f"*/{name}"))
    assert len(files) == 2
    for file in files:
        DAMAGES[damage](file)
    capsys.readouterr()
    assert same(expected, run_tiny(*words, "force=true"))
    assert capsys.readouterr().out.count("is damaged and computed again") == 2
    assert same(expected, run_tiny(*words, "force=true"))
    assert capsys.readouterr().out.count("using the stored states in") == 2


@pytest.mark.parametrize("method", ["wlora", "rlora"])
def test_a_stopped_run_goes_on_bit_for_bit(
    method: str, run_tiny: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WLORA, "dropout=0.1", "train.prefix_cache=memory"]
    if method == "rlora":
        words = ["method=rlora", "k=2", "train.prefix_cache=memory"]
    expected = run_tiny(*words, results=tmp_path / "a")
    from wlora.training import interruption as guard

    after = guard.Guard.__call__

    def stop(self: Any, trainer: Any) -> None:
        if trainer.step == 19:
            self.save(trainer)
            raise Interrupted(15, trainer.step)
        after(self, trainer)

    monkeypatch.setattr(guard.Guard, "__call__", stop)
    with pytest.raises(Interrupted):
        run_tiny(*words, results=tmp_path / "b")
    monkeypatch.setattr(guard.Guard, "__call__", after)
    found = run_tiny(*words, results=tmp_path / "b")
    assert found.resumed_at == [19] and same(found, expected)
    curves = [(tmp_path / part / "records" / f"{found.run_id}.jsonl").read_text() for part in "ab"]
    assert curves[0] == curves[1]


def test_a_folder_that_cannot_be_written_ends_in_a_line(run_tiny: Callable[..., Record], tmp_path: Path) -> None:
    (tmp_path / "prefix_cache").write_text("a file in the way")
    with pytest.raises(Exception, match="prefix_cache is not a folder"):
        run_tiny(*WLORA, "train.prefix_cache=disk")
    assert [path.name for path in tmp_path.iterdir()] == ["prefix_cache"]  # told before anything is written
