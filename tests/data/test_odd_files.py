"""Data and model files that are none, nest without end, or hold what nothing can work on; memory that is exhausted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from tests.conftest import TINY, compose, enter_main
from tests.storage.test_odd_records import DEEP, KINDS, _nothing_waits_for_ever, replace  # noqa: F401
from tests.support.hub_folder import build_folder
from wlora.data.row_checks import MOST_BYTES
from wlora.data.sources import fingerprint, load_splits
from wlora.errors import ConfigError, RunFault, ran_out_of_memory
from wlora.experiment.outcome import classify
from wlora.models.architectures import read_architecture
from wlora.models.source import locate
from wlora.storage.records import Record, RecordStore
from wlora.training import gradients
from wlora.training.trainer import Trainer

ROWS = "".join(json.dumps({"sentence": "a b", "label": row % 2}) + "\n" for row in range(4))


def load(folder: Path) -> None:
    """Read a folder's data as a run does."""
    task = compose("task=sst2", f"task.path={folder}").task
    fingerprint(task)
    load_splits(task, offline=True)


def write_data(folder: Path) -> Path:
    """Write data that can be read."""
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(ROWS)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["train.jsonl", "train.tsv", "train.parquet", "train-00000-of-00001.parquet"])
def test_data_that_are_no_file_are_told(name: str, kind: str, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    load(folder)
    (folder / "train.jsonl").unlink()
    replace(folder / name, kind)
    with pytest.raises(ConfigError, match="task.path="):
        load(folder)


@pytest.mark.parametrize("text", DEEP)
@pytest.mark.parametrize("form", ["%s", '{"sentence": %s, "label": 1}', '{"data": %s}', '{"data": [{"paragraphs": %s}]}'])
def test_data_nested_without_end_are_told(form: str, text: str, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    (folder / "train.jsonl").write_text(form % DEEP[text])
    with pytest.raises(ConfigError, match="train.jsonl"):
        load(folder)


@pytest.mark.parametrize("text", DEEP)
def test_what_a_parquet_file_says_of_itself_may_nest_without_end(text: str, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    (folder / "train.jsonl").unlink()
    table = pa.table({"sentence": ["a", "b"], "label": [0, 1]}).replace_schema_metadata(
        {b"huggingface": DEEP[text].encode()}
    )
    parquet.write_table(table, folder / "train.parquet")
    load(folder)


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_a_cell_of_sixty_megabytes_is_told_before_it_is_tokenised(name: str, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    (folder / "train.jsonl").unlink()
    texts = ["a", "b" * 60_000_000]
    if name == "train.parquet":
        parquet.write_table(pa.table({"sentence": texts, "label": [0, 1]}), folder / name)
    else:
        (folder / name).write_text("".join(json.dumps({"sentence": text, "label": 1}) + "\n" for text in texts))
    with pytest.raises(ConfigError, match=f"column sentence: row 1 has 60,000,000 bytes; allowed .* {MOST_BYTES:,}"):
        load(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a model's folder as on the hub."""
    return build_folder(tmp_path_factory.mktemp("hub") / "model")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "sub/chat_template.jinja"])
def test_a_model_folder_with_what_is_no_file_is_told(name: str, kind: str, hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(hub, folder)
    replace(folder / name, kind)
    model = compose("model=deberta_v3_base").model
    model.path = str(folder)
    if kind == "folder" and name != "config.json":
        locate(model)  # folders are not read; transformers says what it misses
        return
    with pytest.raises(ConfigError, match=f"model.path={folder}: "):
        read_architecture(model)
        locate(model)


@pytest.mark.parametrize("text", DEEP)
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json"],
)
def test_a_model_folder_that_nests_without_end_is_told(
    name: str, text: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(hub, folder)
    (folder / name).write_text('{"model_type": "deberta-v2", "weight_map": DEEP, "x": DEEP}'.replace("DEEP", DEEP[text]))
    words = ["task=story_nli", "model=deberta_v3_base", f"model.path={folder}", "method=lora", "train.max_steps=1"]
    words += ["task.max_train_rows=8", "task.max_eval_rows=8", "task.batch_size=8", "train.accumulation_steps=1"]
    code = enter_main(monkeypatch, *words, f"results_dir={tmp_path / 'r'}")
    error = capsys.readouterr().err
    assert "Traceback" not in error and len([line for line in error.splitlines() if "error: " in line]) == (code != 0), error
    # A tokenizer's own settings may go unread; what decides the model does not.
    assert code == 2 or name in ("tokenizer_config.json", "generation_config.json"), error


@pytest.mark.parametrize(
    "word",
    [
        *("model.architecture={}", "model.architecture=null", "model.architecture=5", "~model.architecture"),
        *(
            "model.architecture={model_type:bert}",
            "model.architecture={model_type:[1]}",
            "model.architecture.model_type=null",
        ),
        *(
            f"model.architecture.{key}={value}"
            for key in ("hidden_size", "num_attention_heads")
            for value in (0, -1, 7, "abc")
        ),
        *(f"model.architecture.hidden_size={value}" for value in ("null", "[1]", "1.5", "1e400", 10**12, 10**26)),
        *(f"model.architecture.intermediate_size={value}" for value in (10**13, "true", "{a:1}")),
        *(f"++model.architecture.{word}" for word in ("hidden_act=nope", "layer_norm_eps=abc", "hidden_dropout_prob=7")),
        *("++model.architecture.pad_token_id=abc", "++model.architecture.quantization_config={a:1}"),
        *("++model.architecture.pruned_heads={0:[0]}", "++model.architecture.attn_implementation=nope"),
    ],
)
@pytest.mark.parametrize("dry", ["true", "false"])
def test_an_odd_architecture_is_told_in_a_line(
    word: str, dry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "method=lora", "train.max_steps=1", word, f"dry_run={dry}", f"results_dir={tmp_path}"]
    code = enter_main(monkeypatch, *words)
    error = capsys.readouterr().err
    assert "Traceback" not in error and code in (0, 1, 2), error
    assert code == 0 or (error.startswith("error: ") and len(error.splitlines()) <= 2), error


def exhaust() -> None:
    """Ask torch for more memory than there is."""
    torch.empty(1 << 60, dtype=torch.uint8)


def test_torch_says_so_in_words_where_the_memory_of_a_cpu_is_exhausted() -> None:
    with pytest.raises(RuntimeError) as told:
        exhaust()
    assert ran_out_of_memory(told.value) and classify(told.value)[0] == "oom"
    assert (
        ran_out_of_memory(MemoryError()) and ran_out_of_memory(torch.OutOfMemoryError()) and not ran_out_of_memory(OSError())
    )
    assert not ran_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize("error", [MemoryError, None])
def test_without_memory_a_cpus_run_takes_smaller_parts(
    error: type[Exception] | None, run_tiny: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate, failed = gradients._accumulate, []

    def once(trainer: Trainer, batches: Any) -> Any:
        if not failed:
            failed.append(True)
            if error:
                raise error
            exhaust()
        return accumulate(trainer, batches)

    monkeypatch.setattr(gradients, "_accumulate", once)
    record = run_tiny("method=lora", "train.max_steps=2")
    assert record.status == "success" and record.events[0]["kind"] == "out_of_memory"


@pytest.mark.parametrize("error", [MemoryError, None])
def test_a_run_without_memory_is_recorded_as_that(
    error: type[Exception] | None, run_tiny: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(trainer: Trainer, batches: Any) -> Any:
        if error:
            raise error
        exhaust()

    monkeypatch.setattr(gradients, "_accumulate", never)
    with pytest.raises(RunFault, match="out of memory with one row at once"):
        run_tiny("method=lora", "train.max_steps=2")
    (record,) = RecordStore(tmp_path)
    assert record.status == "oom"


def test_a_model_that_does_not_fit_into_memory_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wlora.experiment.shared_inputs.load_base", lambda *_, **__: exhaust())
    code = enter_main(monkeypatch, *TINY, "method=lora", f"results_dir={tmp_path}")
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("error: out of memory") and len(error.splitlines()) == 1, error
