"""Summarisation: features and their labels, generation, and whole runs on a tiny encoder-decoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tests.conftest import ROOT, TINY, compose
from wlora.config.identity import run_id, scientific_fields
from wlora.config.schema import ModelConfig, TaskConfig
from wlora.data.features import Features
from wlora.data.sources import load_splits
from wlora.errors import ConfigError
from wlora.experiment.build import assemble
from wlora.methods.registry import build_method
from wlora.models.loading import load_model
from wlora.models.source import ModelSource, locate
from wlora.models.tiny import build_tokenizer
from wlora.tasks.base import build_task
from wlora.tasks.summarization import IGNORED, Summarization
from wlora.training.precision import Precision, lower_base

STORY = ["task=story_summary", "model=tiny_bart", "task.max_train_rows=64", "task.max_eval_rows=16", "task.batch_size=8"]
STORY += ["train.max_steps=12", "task.generation.max_new_tokens=12", "targets=all", "lr=1e-2"]
ROWS = Dataset.from_dict(
    {
        "document": ["Anna went to the bank. Ben took the lamp.", "", "Ben entered the school."],
        "summary": ["Anna is in the bank.", "Ben is in the school and Anna is in the bank.", ""],
    }
)
TOKENIZER = build_tokenizer()


def make_task(**fields: Any) -> Summarization:
    known = {
        "name": "xsum",
        "kind": "summarization",
        "columns": ["document", "summary"],
        "validation": ["validation"],
        "metrics": ["rouge1"],
        "primary_metric": "rouge1",
    }
    task = build_task(TaskConfig(**(known | fields)))
    assert isinstance(task, Summarization)
    return task


def make_model(**changes: Any) -> PreTrainedModel:
    config = compose("task=story_summary", "model=tiny_bart").model
    config.architecture = {**config.architecture, **changes}
    model = load_model(config, ModelSource(None, None), TOKENIZER, head="seq2seq", num_labels=1, seed=0)
    return model.eval()


def encode(task: Summarization, rows: Dataset = ROWS) -> tuple[Features, dict[str, torch.Tensor]]:
    features = task.encode(rows, TOKENIZER, training=True)
    return features, task.collate(features.rows(range(len(features))), TOKENIZER)


def test_padded_labels_are_ignored_and_empty_texts_are_kept() -> None:
    features, batch = encode(make_task())
    start, end = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    lengths = [8, 14, 2]  # words and stops, and the two ends
    assert features.column("loss_tokens") == lengths and features.column("length") == [13, 2, 7]
    assert batch["labels"].shape == (3, 14) and batch["labels"].dtype == torch.int64
    assert (batch["labels"] != IGNORED).sum(dim=1).tolist() == lengths
    assert batch["labels"][2].tolist() == [start, end, *[IGNORED] * 12]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].sum(dim=1).tolist() == [13, 2, 7]


def test_the_model_shifts_the_labels_right_and_leaves_padding_out_of_the_loss() -> None:
    _, batch = encode(make_task())
    model = make_model()
    outputs = model(**batch)
    shifted = torch.full_like(batch["labels"], TOKENIZER.pad_token_id)
    shifted[:, 0] = TOKENIZER.eos_token_id  # what starts BART's decoder
    shifted[:, 1:] = batch["labels"][:, :-1].masked_fill(batch["labels"][:, :-1] == IGNORED, TOKENIZER.pad_token_id)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, decoder_input_ids=shifted).logits
    assert torch.allclose(outputs.logits, logits, atol=1e-6)
    real = batch["labels"] != IGNORED
    assert real.sum() == 24
    by_hand = -logits.log_softmax(-1)[real].gather(1, batch["labels"][real][:, None]).mean()
    assert torch.allclose(outputs.loss, by_hand, atol=1e-6)


def test_documents_and_summaries_are_cut_and_the_cut_rows_counted() -> None:
    task = make_task(max_length=8, max_target_length=10)
    features, _ = encode(task)
    assert features.column("length") == [8, 2, 7] and features.column("loss_tokens") == [8, 10, 2]
    assert features.truncated_share == pytest.approx(2 / 3)
    assert all(ids[-1] == TOKENIZER.eos_token_id for ids in features.column("labels"))
    task = make_task(max_length=13, max_target_length=14)
    features, _ = encode(task)
    assert features.truncated_share == 0


def test_a_step_is_the_same_however_its_rows_are_cut_into_micro_batches() -> None:
    task, model = make_task(), make_model()
    features, batch = encode(task)
    weights = features.loss_weights
    parts = [model(**task.collate(features.rows([row]), TOKENIZER)).loss * weights[row] for row in range(3)]
    assert torch.allclose(model(**batch).loss, sum(parts) / sum(weights), atol=1e-6)
    assert Features([pa.table({"labels": [1, 0]})]).loss_weights == [1, 1]


def generate(task: Summarization, model: PreTrainedModel) -> tuple[list[str], list[dict[str, Any]]]:
    """Return what `predict` returns, and the settings that reached the decoding."""
    features, batch = encode(task)
    seen: list[dict[str, Any]] = []
    prepare = model._prepare_generation_config

    def spy(*args: Any, **kwargs: Any) -> Any:
        found = prepare(*args, **kwargs)
        seen.append(found[0].to_dict())
        return found

    model._prepare_generation_config = spy  # type: ignore[method-assign]
    with torch.no_grad():
        return task.predict(model, features.rows(range(len(features))), batch, model(**batch)), seen


def test_the_models_own_generation_settings_hold_where_nothing_is_overridden() -> None:
    model = make_model()
    model.generation_config.update(num_beams=3, max_length=9, no_repeat_ngram_size=3, early_stopping=True, do_sample=True)
    texts, (seen,) = generate(make_task(), model)
    assert (seen["num_beams"], seen["max_length"], seen["no_repeat_ngram_size"]) == (3, 9, 3)
    assert seen["do_sample"] is False  # the same model writes the same summaries
    with torch.no_grad():
        _, batch = encode(make_task())
        plain = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert texts == TOKENIZER.batch_decode(plain, skip_special_tokens=True) and len(texts) == 3
    assert plain.shape[1] <= 9


def test_overrides_reach_the_generation_without_a_complaint(capfd: pytest.CaptureFixture[str]) -> None:
    model = make_model()
    model.generation_config.update(num_beams=3, max_length=9, min_length=2)
    overrides = {"num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 5, "length_penalty": 0.5}
    config = compose("task=story_summary", "model=tiny_bart", *(f"task.generation.{k}={v}" for k, v in overrides.items()))
    texts, (seen,) = generate(make_task(generation=config.task.generation), model)
    assert overrides.items() <= seen.items()
    assert capfd.readouterr().err == ""
    assert texts == generate(make_task(generation=config.task.generation), model)[0]


def test_a_frozen_base_in_bfloat16_generates_and_its_loss_is_float32() -> None:
    model = make_model()
    config = compose("task=story_summary", "model=tiny_bart", "method=lora")
    method = build_method(config.method)
    assert assemble(config, model, method).head == {}  # the head is the pretrained one
    lower_base(model, Precision("bf16", "test"))
    task = make_task()
    _, batch = encode(task)
    outputs = model(**batch)
    assert outputs.loss.dtype == torch.float32 and model.get_input_embeddings().weight.dtype == torch.bfloat16
    outputs.loss.backward()
    adapters = list(method.adapters.values())
    assert adapters and all(a.B.dtype == torch.float32 and a.B.grad.dtype == torch.float32 for a in adapters)
    assert len(generate(task, model)[0]) == 3


def test_a_checkpoint_of_the_bare_body_loads_with_its_generation_settings(tmp_path: Path) -> None:
    # As bart-large stands on the hub: no prefix, no output layer, generation settings in config.json alone.
    source = make_model()
    source.model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_beams": 4, "no_repeat_ngram_size": 3}))
    TOKENIZER.save_pretrained(tmp_path)
    config = ModelConfig(name="tiny_bart", source="random", path=str(tmp_path), architecture={"model_type": "bart"})
    loaded = load_model(config, locate(config), TOKENIZER, head="seq2seq", num_labels=1, seed=0)
    assert (loaded.generation_config.num_beams, loaded.generation_config.no_repeat_ngram_size) == (4, 3)
    _, batch = encode(make_task())
    assert torch.equal(loaded.eval()(**batch).loss, source(**batch).loss)
    assert generate(make_task(), loaded)[1][0]["num_beams"] == 4


@pytest.mark.parametrize("method", ["lora", "wlora"])
def test_a_run_repeats_bit_for_bit(method: str, run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    first, again = (run_tiny(*STORY, f"method={method}", results=tmp_path / name) for name in "ab")
    assert first.status == "success" and first.primary_metric == "rouge1"
    assert first.metrics == again.metrics and first.run_id == again.run_id
    low, mean, high = (first.metrics[f"rouge1{end}"] for end in ("_low", "", "_high"))
    assert 0 < low <= mean + 1e-12 and mean <= high + 1e-12 and high <= 1, "of equal summaries they differ by rounding"
    assert {"rouge2", "rougeL", "rougeLsum", "loss"} <= set(first.metrics)
    assert first.parameters["head"] == 0 and (method == "lora" or len(first.adapters) <= 5)


def test_an_adapter_learns_the_wording_and_beams_make_another_run(run_tiny: Callable[..., Any]) -> None:
    plain = run_tiny(*STORY, "method=lora", "task.max_train_rows=256", "train.max_steps=40", "dropout=0")
    beams = run_tiny(*STORY, "method=lora", "task.generation.num_beams=2")
    assert plain.metrics["rouge1"] > 0.4  # an untrained model writes nothing of it
    assert beams.config["task"]["generation"]["num_beams"] == 2 and beams.run_id != plain.run_id


def write_local(folder: Path, rows: dict[str, list[Any]]) -> Path:
    for split in ("train", "validation"):
        Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def test_local_files_in_the_benchmarks_schema(tmp_path: Path) -> None:
    rows = {"document": ["First line.\nSecond line.", "", "c"], "summary": ["a", "b", "c"], "id": ["1", "2", "3"]}
    task = compose("task=xsum", "model=tiny_bart", "task.max_length=64", f"task.path={write_local(tmp_path, rows)}").task
    loaded = load_splits(task, offline=True).rows["train"]
    assert loaded[:] == {key: rows[key] for key in ("document", "summary")}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"document": ["a"], "highlights": ["b"]}, "no column summary"),
        ({"document": [None, None], "summary": ["b", "c"]}, "column document: all 2 rows are empty (null)"),
        ({"document": ["a"], "summary": [3]}, "column summary holds int64; expected is text"),
    ],
)
def test_bad_local_files_are_told(rows: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    task = compose("task=xsum", "model=tiny_bart", "task.max_length=64", f"task.path={write_local(tmp_path, rows)}").task
    with pytest.raises(ConfigError) as caught:
        load_splits(task, offline=True)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"columns": ["document"]}, "task.columns"),
        ({"metrics": ["rouge3"]}, "task.metrics=rouge3: allowed is rouge1, rouge2, rougeL, rougeLsum for summaries"),
        ({"metrics": ["accuracy"]}, "task.metrics=accuracy: allowed is rouge1"),
        ({"primary_metric": "rouge2"}, "task.primary_metric=rouge2: allowed is rouge1"),
    ],
)
def test_a_task_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(**fields)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=xsum", "model=minilm"], "a bert model has no seq2seq head"),
        (["task=cnn_dailymail"], "a deberta-v2 model has no seq2seq head"),
        (["task=xsum", "model=smollm2_135m"], "a llama model has no seq2seq head"),
        (["task=xsum", "model=tiny_bart"], "task.max_length=768: allowed is at most 512"),
        (["task=story_summary", "model=tiny_bart", "method=probe"], "nothing would train"),
        ([*STORY, "task.generation.max_new_tokens=600"], "at most 512"),
        ([*STORY, "task.generation.min_new_tokens=13"], "allowed is 0 to 12"),
        ([*STORY, "task.generation.num_beams=0"], "int >= 1 or null"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(*words)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_the_keys_of_generation_are_in_the_run_id_of_summaries_and_of_no_other_task() -> None:
    def identity(*words: str) -> tuple[str, dict[str, Any]]:
        fields = scientific_fields(compose(*words), task_data="x", model_data=None, precision="fp32")
        return run_id(fields), fields["task"]

    assert not {"generation", "max_target_length"} & set(identity("task=rte")[1])
    assert identity(*STORY)[1]["max_target_length"] == 32
    assert identity(*STORY)[0] != identity(*STORY, "task.generation.num_beams=2")[0]


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(tmp_path: Path, run_tiny: Callable[..., Any]) -> None:
    words = [*STORY, "method=lora", "task.batch_size=6", "train.max_steps=4", "dropout=0", "precision=fp32"]
    words.append("+model.architecture.dropout=0")
    alone = run_tiny(*words, results=tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "wlora.run"]
    done = subprocess.run(
        [*launch, *TINY, *words, f"results_dir={tmp_path / 'two'}"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "two" / "records").glob("*.json")
    assert json.loads(file.read_text())["metrics"] == pytest.approx(alone.metrics, abs=1e-4)
