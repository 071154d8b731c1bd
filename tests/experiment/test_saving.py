"""Saved models: plain transformers folders that hold exactly what was trained, and from which runs start."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import ROOT, TINY, compose
from tests.support.bart_folder import build_bart_folder
from tests.support.conf_files import FITTING, METHODS, RELEASED, whole_runs
from tests.support.outputs import TEXTS, logits
from wlora.config.identity import scientific_fields
from wlora.errors import ConfigError, RunFault
from wlora.experiment import run as experiment
from wlora.experiment import saving
from wlora.methods.base import Method
from wlora.models.heads import name_classes
from wlora.models.loading import load_model
from wlora.models.source import locate
from wlora.models.tokenizer import load_tokenizer
from wlora.storage.atomic_write import Put
from wlora.storage.records import RecordStore

pytestmark = pytest.mark.integration

STORY = ["task=story_summary", "model=tiny_bart", "targets=all", "task.max_train_rows=64", "task.max_eval_rows=16"]
STORY += ["task.generation.max_new_tokens=12", "precision=fp32", "lr=1e-2"]
SPECIAL = {**FITTING, "single": ["method.index=4"]}

Seen = dict[str, Any]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Catch a run's model just before it is saved: stronger adapters, so that they matter, and the logits with them."""
    found: Seen = {}

    def save(model: PreTrainedModel, method: Method, tokenizer: PreTrainedTokenizerBase, folder: Path, put: Put) -> None:
        torch.manual_seed(0)
        before = logits(model, tokenizer)
        for parameter in {p for adapter in method.attached().values() for p in adapter.parameters() if p.dim()}:
            parameter.data.add_(0.5 * torch.randn_like(parameter))
        found.update(logits=logits(model, tokenizer), tokenizer=tokenizer)
        found["moved"] = float((found["logits"] - before).abs().max())
        saving.save_model(model, method, tokenizer, folder, put)
        found["folded"] = logits(model, tokenizer)

    monkeypatch.setattr(experiment, "save_model", save)
    return found


def run(results: Path, *words: str) -> tuple[Any, Path]:
    """Run with `train.save_model`; returns the record and the model's folder."""
    record = experiment.run(compose(*TINY, "precision=fp32", *words, "train.save_model=true", f"results_dir={results}"))
    return record, results / "models" / record.run_id


def load(folder: Path, *words: str, head: str, num_labels: int = 3) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a folder as a run does that keeps its head, with another seed than the run that wrote it."""
    kept = [] if head == "seq2seq" or num_labels != 3 else ["model.head=kept"]
    config = compose(*TINY, *words, *kept, f"model.path={folder}")
    tokenizer = load_tokenizer(config.model, locate(config.model))
    return load_model(config.model, locate(config.model), tokenizer, head=head, num_labels=num_labels, seed=7), tokenizer


@pytest.mark.parametrize("method", whole_runs([*METHODS, *RELEASED]))
def test_folding_any_method_changes_no_logit(method: str, seen: Seen, tmp_path: Path) -> None:
    words = [*f"method={method}".split(), "targets=all", "rank=4", "train.max_steps=20"]
    _, folder = run(tmp_path, *words, *SPECIAL.get(method, []))
    assert torch.allclose(seen["folded"], seen["logits"], atol=1e-5)
    assert seen["moved"] > 1e-4 or method in ("full", "probe"), "the adapters took part"
    model, tokenizer = load(folder, head="sequence_classification")
    assert torch.equal(logits(model, tokenizer), seen["folded"])
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.allclose(logits(plain, tokenizer), seen["folded"], atol=1e-6)  # another kernel of attention


@pytest.mark.parametrize(
    ("words", "head"),
    [
        (["model=tiny_bert", "task=story_nli"], "sequence_classification"),
        (["model=tiny_llama", "task=story_nli"], "sequence_classification"),
        (["model=tiny_deberta", "task=story_nli"], "sequence_classification"),
        (["model=tiny_bart", "task=story_nli"], "sequence_classification"),
        (STORY, "seq2seq"),
    ],
)
def test_a_run_starts_from_exactly_the_saved_weights(words: list[str], head: str, seen: Seen, tmp_path: Path) -> None:
    _, folder = run(tmp_path, *words, "method=wlora", "targets=all", "k=3", "train.max_steps=16")
    assert torch.allclose(seen["folded"], seen["logits"], atol=1e-5) and seen["moved"] > 1e-3
    model, tokenizer = load(folder, *words, head=head)
    assert torch.equal(logits(model, tokenizer), seen["folded"])
    assert tokenizer.get_vocab() == seen["tokenizer"].get_vocab() and tokenizer.pad_token == seen["tokenizer"].pad_token
    assert tokenizer(*TEXTS) == seen["tokenizer"](*TEXTS)
    record, _ = run(tmp_path, *words, "method=lora", "train.max_steps=2", f"model.path={folder}")
    source = locate(compose(*TINY, *words, f"model.path={folder}").model)
    assert record.status == "success" and record.model["fingerprint"] == source.fingerprint


def test_full_fine_tuning_on_stories_and_lora_from_there(seen: Seen, tmp_path: Path) -> None:
    first, folder = run(tmp_path, *STORY, "method=full", "task.max_train_rows=256", "train.max_steps=120", "lr=3e-3")
    assert torch.equal(seen["folded"], seen["logits"])
    assert first.metrics["rouge1"] > 0.4
    again = ["method=lora", "train.max_steps=2", "lr=1e-9", f"model.path={folder}"]
    second = experiment.run(compose(*TINY, *STORY, *again, f"results_dir={tmp_path}"))
    # B is zero, and two steps of that rate move nothing: what is scored is the saved model.
    assert second.metrics["rouge1"] == first.metrics["rouge1"]
    assert second.metrics["loss"] == pytest.approx(first.metrics["loss"], abs=1e-5)
    assert second.parameters["base"] == 0 and len(second.adapters) == 2 * 6 + 2 * 10


def test_the_base_of_another_precision_is_saved_as_it_was_trained(tmp_path: Path) -> None:
    _, folder = run(tmp_path, "method=lora", "precision=bf16")
    content = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    words = "bert.embeddings.word_embeddings.weight"
    assert all(tensor.dtype == torch.float32 for tensor in content.values())
    assert torch.equal(content[words], content[words].bfloat16().float()), "frozen, and in bfloat16 during the run"
    query = content["bert.encoder.layer.0.attention.self.query.weight"]
    assert not torch.equal(query, query.bfloat16().float()), "with an adapter folded in, which is not rounded"


def test_a_head_for_another_kind_of_label_trains_by_its_own_loss(tmp_path: Path) -> None:
    # transformers notes in the configuration by which loss a head was trained last, and would keep to it.
    _, folder = run(tmp_path, "method=lora")
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "single_label_classification"
    model, tokenizer = load(folder, head="sequence_classification", num_labels=1)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    out = model(**batch, labels=torch.tensor([0.25, 4.0]))
    assert float(out.loss) == pytest.approx(
        float(((out.logits.squeeze() - torch.tensor([0.25, 4.0])) ** 2).mean()), rel=1e-5
    )


@pytest.mark.parametrize("family", ["bert", "deberta", "bart", "llama"])
def test_the_head_of_a_trained_model_is_fresh_unless_it_is_kept(family: str, tmp_path: Path) -> None:
    words = [f"model=tiny_{family}", "precision=fp32", "train.max_steps=1", "task.max_eval_rows=8", "method=lora"]
    record, folder = run(tmp_path, *words, "train.max_steps=4", "lr=1e-2")
    still = [*TINY, *words, "lr=1e-12", f"model.path={folder}", "task.max_eval_rows=48", f"results_dir={tmp_path}"]
    losses = [experiment.run(compose(*still, f"seed={seed}")).metrics["loss"] for seed in (0, 1)]
    kept = experiment.run(compose(*still, "model.head=kept"))
    whole = experiment.run(compose(*still, "model.head=kept", "seed=1"))
    assert losses[0] != losses[1] and kept.metrics["loss"] not in losses
    assert kept.metrics["loss"] == pytest.approx(whole.metrics["loss"], abs=1e-5)
    body = load_file(folder / "model.safetensors")
    config = compose(*still)
    tokenizer = load_tokenizer(config.model, locate(config.model))
    model = load_model(config.model, locate(config.model), tokenizer, head="sequence_classification", num_labels=3, seed=7)
    now = model.state_dict()
    same = {name: torch.equal(now[name], tensor) for name, tensor in body.items() if name.endswith("weight")}
    # BERT's pooler comes with the pretrained model; DeBERTa's pooler and BART's whole head do not.
    changed = {name.removesuffix(".weight") for name, equal in same.items() if not equal}
    expected = {"bert": {"classifier"}, "llama": {"score"}, "deberta": {"classifier", "pooler.dense"}}
    assert changed == expected.get(family, {"classification_head.dense", "classification_head.out_proj"})


def test_the_head_for_questions_is_fresh_unless_it_is_kept(tmp_path: Path) -> None:
    words = ["task=story_qa", "precision=fp32", "train.max_steps=1", "task.max_eval_rows=8", "method=lora"]
    _, folder = run(tmp_path, *words)
    trained = load_file(folder / "model.safetensors")["qa_outputs.weight"]
    for head, equal in (("fresh", False), ("kept", True)):
        config = compose(*TINY, *words, f"model.path={folder}", f"model.head={head}")
        tokenizer = load_tokenizer(config.model, locate(config.model))
        model = load_model(config.model, locate(config.model), tokenizer, head="question_answering", num_labels=2, seed=7)
        assert torch.equal(model.get_parameter("qa_outputs.weight"), trained) is equal
    with pytest.raises(ConfigError, match="model.head=kept: model.path=.* has no classifier.bias of this shape"):
        told = json.loads((folder / "config.json").read_text()) | {"id2label": {str(n): f"LABEL_{n}" for n in range(3)}}
        (folder / "config.json").write_text(json.dumps(told))
        run(tmp_path, "method=lora", f"model.path={folder}", "model.head=kept")


def test_a_kept_head_gives_the_classes_of_the_task_in_its_order(tmp_path: Path) -> None:
    _, folder = run(tmp_path, "method=lora", "train.max_steps=4", "lr=1e-2")
    still = [*TINY, "precision=fp32", "method=lora", "lr=1e-12", "train.max_steps=1", f"results_dir={tmp_path}"]
    kept = [*still, f"model.path={folder}", "model.head=kept"]
    before = experiment.run(compose(*kept)).metrics
    file, weights = folder / "config.json", folder / "model.safetensors"
    content, told = load_file(weights), json.loads(file.read_text())
    order = [2, 0, 1]  # another tool's order of the same classes, in its own spelling
    names = list(told["id2label"].values())
    save_file({k: v[order] if k.startswith("classifier.") else v for k, v in content.items()}, weights, {"format": "pt"})
    told["id2label"] = {str(place): names[number].upper() for place, number in enumerate(order)}
    file.write_text(json.dumps(told))
    assert experiment.run(compose(*kept)).metrics == before
    wrong = {"yes, maybe, no": ["yes", "maybe", "no"], "2 outputs": names[:2]}
    for message, found in wrong.items():
        file.write_text(json.dumps(told | {"id2label": {str(place): name for place, name in enumerate(found)}}))
        with pytest.raises(ConfigError, match=rf"model.head=kept: .*{message}"):
            compose(*kept)


def test_a_kept_head_of_tags_gives_the_classes_of_the_task_in_its_order(tmp_path: Path) -> None:
    file = tmp_path / "ner.jsonl"
    rows = [{"tokens": [name, "left", "the", "garden"], "ner_tags": ["B-PER", *"OOO"]} for name in ("Anna", "Ben") * 10]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["task=token_classification", f"task.path={file}", "method=lora", "task.batch_size=4"]
    trained, folder = run(tmp_path, *task, "lr=1e-2", "targets=all", "train.max_steps=24")
    assert trained.metrics["f1"] == 1 and trained.config["task"]["labels"] == ["B-PER", "O"]
    still = [*task, "lr=1e-12", "train.max_steps=1", f"model.path={folder}", "model.head=kept"]
    assert run(tmp_path, *still, "task.labels=[O,B-PER]")[0].metrics["f1"] == 1
    with pytest.raises(ConfigError, match="model.head=kept: the classes of .* are b-per, o, but the task has o, b-loc"):
        compose(*TINY, *still, "task.labels=[O,B-LOC]", f"task.path={_with_places(file)}")


def _with_places(file: Path) -> Path:
    other = file.with_name("places.jsonl")
    other.write_text(file.read_text().replace("B-PER", "B-LOC"))
    return other


def test_a_head_is_kept_only_where_there_is_one_to_keep(tmp_path: Path) -> None:
    _, folder = run(tmp_path, "method=lora")
    there, adapter = [f"model.path={folder}", "model.head=kept"], next((tmp_path / "adapters").iterdir())
    for words, message in (
        (["model.head=kept"], "model.head=kept: allowed is fresh without model.path=DIR"),
        (
            [*there, f"adapter.path={adapter}", "adapter.head=true"],
            "adapter.head=true: allowed is false with model.head=kept",
        ),
        ([*there, "model.head=old"], "model.head=old: allowed is fresh | kept"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            compose(*TINY, *words)
    plain, kept = (compose(*TINY, f"model.path={folder}", f"model.head={head}") for head in ("fresh", "kept"))
    fields = [scientific_fields(config, task_data="t", model_data="m", precision="fp32") for config in (plain, kept)]
    assert "head" not in fields[0]["model"] and fields[1]["model"]["head"] == "kept"


def test_a_saved_model_names_its_classes_and_nothing_of_another_training(tmp_path: Path) -> None:
    _, folder = run(tmp_path, "method=lora", "train.max_steps=1")
    told = json.loads((folder / "config.json").read_text())
    assert told["id2label"] == {"0": "entailment", "1": "neutral", "2": "contradiction"}
    assert told["label2id"] == {"entailment": 0, "neutral": 1, "contradiction": 2}
    _, questions = run(tmp_path, "task=story_qa", "method=lora", "train.max_steps=1", f"model.path={folder}")
    told = json.loads((questions / "config.json").read_text())
    assert "entailment" not in str(told) and told.get("problem_type") is None
    model, _ = load(folder, head="sequence_classification", num_labels=1)
    name_classes(model, [], head="sequence_classification")
    assert (model.config.problem_type, model.config.id2label) == ("regression", {0: "LABEL_0"})


def test_generation_settings_go_along_even_those_that_transformers_would_not_write(tmp_path: Path) -> None:
    bart = build_bart_folder(tmp_path / "bart")  # its own settings: four beams, early stopping
    local = ["task=story_summary", "model=bart_large", f"model.path={bart}", "task.max_length=64", "task.batch_size=8"]
    words = [*local, "task.max_train_rows=16", "task.max_eval_rows=4", "train.max_steps=1", "method=lora"]
    _, folder = run(tmp_path, *words, "task.generation.num_beams=1", "task.generation.max_new_tokens=5")
    kept = AutoModelForSeq2SeqLM.from_pretrained(folder).generation_config
    assert (kept.num_beams, kept.max_new_tokens, kept.early_stopping, kept.no_repeat_ngram_size) == (1, 5, True, 3)


def test_saving_is_no_part_of_the_identity_and_a_missing_model_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, folder = run(tmp_path, "method=lora")
    first = (folder / "model.safetensors").read_bytes()
    assert f"model      {folder}" in capsys.readouterr().out
    plain = experiment.run(compose(*TINY, "precision=fp32", "method=lora", f"results_dir={tmp_path}"))
    assert plain.run_id == record.run_id and "notice" not in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == [record.run_id], "nothing half-written is left"
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    run(tmp_path, "method=lora")
    said = capsys.readouterr().out
    assert "is done" in said and f"notice: its model is missing ({folder})" in said and "force=true" in said
    assert not folder.exists()
    (folder / "old").mkdir(parents=True)  # what a run with force replaces
    run(tmp_path, "method=lora", "force=true")
    assert (folder / "model.safetensors").read_bytes() == first and not (folder / "old").exists()


def test_a_full_disk_leaves_the_record_and_no_half_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")

    words = ["method=lora", "train.checkpoint_every=4", "train.max_steps=10"]
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        with pytest.raises(
            RunFault,
            match="cannot be written \\(No space left on device\\); an older folder and the run's record are kept",
        ):
            run(tmp_path, *words)
    assert not list((tmp_path / "models").iterdir())
    (before,) = RecordStore(tmp_path)
    assert before.status == "success" and list(tmp_path.glob("checkpoints/*/step-00000008"))
    # The same command goes on from the last checkpoint.
    record, folder = run(tmp_path, *words)
    assert record.resumed_at == [8] and record.metrics == before.metrics and record.curve == before.curve
    assert (folder / "model.safetensors").is_file() and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=minilm", "model.quantization=nf4"], "false with model.quantization=nf4"),
        (["model=smollm2_135m", "model.gguf_file=q4.gguf"], "false with model.gguf_file=q4.gguf"),
    ],
)
def test_packed_weights_are_refused_before_anything_is_loaded(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("task=story_nli", *words, "train.save_model=true")
    assert (
        str(caught.value)
        == f"train.save_model=true: allowed is {message}: adapters are not merged into weights from quantised ones"
    )


def test_a_relative_path_stays_relative_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record, _ = run(Path("out"), "method=lora", "train.max_steps=2")
    again, _ = run(Path("out"), "method=lora", "train.max_steps=2", f"model.path=out/models/{record.run_id}")
    text = (tmp_path / "out" / "records" / f"{again.run_id}.json").read_text()
    assert f'"out/models/{record.run_id}"' in text and str(tmp_path) not in text and str(ROOT) not in text
    assert os.path.basename(os.getcwd()) not in text
