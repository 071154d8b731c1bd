"""Rows from local files of every format, from the generator and the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from tests.support.mnli_files import ROWS, Rows, fault_of, make_task, write, write_both
from wlora.data.local_files import EXTENSIONS
from wlora.data.sources import fingerprint, load_splits
from wlora.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_format_gives_the_same_rows(tmp_path: Path, extension: str) -> None:
    write_both(tmp_path, ROWS | {"idx": list(range(5))}, extension)
    splits = load_splits(make_task(tmp_path), offline=True)
    assert list(splits.rows) == ["train", "validation_matched"]
    assert splits.rows["train"][:] == ROWS
    assert splits.rows["validation_matched"][:] == ROWS
    assert splits.revision is None


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    for number, part in enumerate([slice(0, 2), slice(2, 5)]):
        shard = {name: values[part] for name, values in ROWS.items()}
        write(tmp_path / f"train-{number:05}-of-00002.parquet", shard)
    write(tmp_path / "validation_matched-00000-of-00001.parquet", ROWS)
    assert load_splits(make_task(tmp_path), offline=True).rows["train"][:] == ROWS
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    assert "all its shards" in fault_of(make_task(tmp_path))


def _lay_out(records: list[dict[str, Any]], form: str) -> str:
    """Return rows as JSON in one of the forms that tools write."""
    indented = [json.dumps(record, indent=2) for record in records]
    return {
        "indented list": json.dumps(records, indent=4),
        "indented objects": "\n".join(indented),
        "data": json.dumps({"version": 1, "data": records}),
        "indented data": json.dumps({"data": records}, indent=2),
        "blank lines": "\n\n".join(map(json.dumps, records)) + "\n \n",
    }[form]


@pytest.mark.parametrize("form", ["indented list", "indented objects", "data", "indented data", "blank lines"])
@pytest.mark.parametrize("extension", ["json", "jsonl"])
def test_json_may_be_laid_out_as_it_likes(tmp_path: Path, form: str, extension: str) -> None:
    records = [dict(zip(ROWS, values, strict=True)) for values in zip(*ROWS.values(), strict=True)]
    for split in ("train", "validation_matched"):
        (tmp_path / f"{split}.{extension}").write_text(_lay_out(records, form))
    assert load_splits(make_task(tmp_path), offline=True).rows["train"][:] == ROWS


@pytest.mark.parametrize("extension", ["json", "jsonl", "csv", "tsv"])
def test_texts_of_windows_with_their_mark_and_line_ends_are_the_same_rows(tmp_path: Path, extension: str) -> None:
    for file in write_both(tmp_path, ROWS, extension).iterdir():
        lines = file.read_bytes().replace(b"\r\n", b"\n")
        file.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    assert load_splits(make_task(tmp_path), offline=True).rows["train"][:] == ROWS


def test_csv_may_break_lines_within_quotes(tmp_path: Path) -> None:
    rows: Rows = {"premise": ["two\nlines"], "hypothesis": ["a, b"], "label": [1]}
    assert load_splits(make_task(write_both(tmp_path, rows, "csv")), offline=True).rows["train"][:] == rows


def test_tsv_may_have_unbalanced_quotes(tmp_path: Path) -> None:
    rows: Rows = {"premise": ['" open', "next"], "hypothesis": ["a", 'b "'], "label": [1, 0]}
    assert load_splits(make_task(write_both(tmp_path, rows, "tsv")), offline=True).rows["train"][:] == rows


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_labels_may_be_class_names(tmp_path: Path, extension: str) -> None:
    names = ["entailment", "Neutral", "contradiction ", "neutral", "ENTAILMENT"]
    task = make_task(write_both(tmp_path, ROWS | {"label": names}, extension))
    assert load_splits(task, offline=True).rows["train"][:]["label"] == ROWS["label"]


def write_named(file: Path, names: list[str], labels: list[int]) -> None:
    """Write rows with these class numbers as the datasets library does, which notes the classes' names beside them."""
    text = datasets.Value("string")
    features = datasets.Features({"premise": text, "hypothesis": text, "label": datasets.ClassLabel(names=names)})
    rows = {"premise": ["a"] * len(labels), "hypothesis": ["b"] * len(labels), "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


@pytest.mark.parametrize(
    "names",
    [
        ["contradiction", "neutral", "entailment"],
        ["Contradiction", "NEUTRAL", " entailment"],
        ["contradiction", "neutral", "entailment", "unused"],
        ["2", "1", "0"],
    ],
)
def test_the_class_names_of_a_file_are_found_in_any_order_and_case(tmp_path: Path, names: list[str]) -> None:
    write_named(tmp_path / "train.parquet", names, [0, 1, 2, 0])
    write_named(tmp_path / "validation_matched.parquet", ["entailment", "neutral", "contradiction"], [0, 1, 2, 0])
    splits = load_splits(make_task(tmp_path), offline=True).rows
    assert splits["train"][:]["label"] == [2, 1, 0, 2] and splits["validation_matched"][:]["label"] == [0, 1, 2, 0]


def test_each_shard_is_read_by_its_own_names_and_types(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"train-{number:05}-of-00003.parquet" for number in range(3))
    write_named(first, ["entailment", "neutral", "contradiction"], [0, 1, 2])
    write_named(second, ["Neutral", "Contradiction", "Entailment"], [0, 1, 2])
    pq.write_table(pa.table({"label": ["contradiction"], "hypothesis": ["b"], "premise": ["a"]}), third)
    write(tmp_path / "validation_matched.jsonl", ROWS)
    assert load_splits(make_task(tmp_path), offline=True).rows["train"][:]["label"] == [0, 1, 2, 1, 2, 0, 2]
    pq.write_table(pq.read_table(third).slice(0, 0), third)
    assert len(load_splits(make_task(tmp_path), offline=True).rows["train"]) == 6, "an empty shard has no rows to check"
    write_named(second, ["yes", "no"], [0])
    message = fault_of(make_task(tmp_path))
    assert f"{second.name}: column label: row 0 has 'yes'; the column holds yes\nallowed is 0..2 (entailment, " in message


def test_classes_of_other_names_are_refused_with_both_lists(tmp_path: Path) -> None:
    for split in ("train", "validation_matched"):
        write_named(tmp_path / f"{split}.parquet", ["no", "maybe", "yes"], [2, 1, 0])
    message = fault_of(make_task(tmp_path))
    assert "train.parquet: column label: row 0 has 'yes'; the column holds maybe, no, yes\n" in message
    assert "0..2 (entailment, neutral, contradiction)" in message
    write_named(tmp_path / "train.parquet", ["entailment", "neutral", "contradiction"], [-1, 0, 1])
    assert "row 0 has '-1 (no class of the file)', as hidden test labels do" in fault_of(make_task(tmp_path))


def test_classes_that_differ_in_case_only_are_told_apart(tmp_path: Path) -> None:
    write_both(tmp_path, {"premise": ["a"] * 3, "hypothesis": ["b"] * 3, "label": ["a", "A", "0"]})
    assert load_splits(make_task(tmp_path, labels=["A", "a"]), offline=True).rows["train"][:]["label"] == [1, 0, 0]


def test_values_that_a_file_holds_as_classes_are_read_by_their_names(tmp_path: Path) -> None:
    for split in ("train", "validation_matched"):
        write_named(tmp_path / f"{split}.parquet", ["0.0", "2.5", "5.0"], [2, 0, 1])
    assert load_splits(make_task(tmp_path, labels=[]), offline=True).rows["train"][:]["label"] == [5.0, 0.0, 2.5]


def test_categories_and_large_strings_of_pandas_are_read(tmp_path: Path) -> None:
    table = pa.table(
        {
            "premise": pa.array(ROWS["premise"], pa.large_string()),
            "hypothesis": pa.array(ROWS["hypothesis"]).dictionary_encode(),
            "label": pa.array(["neutral"] * 5).dictionary_encode(),
        }
    )
    for split in ("train", "validation_matched"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    rows = load_splits(make_task(tmp_path), offline=True).rows["train"]
    assert rows[:] == ROWS | {"label": [1] * 5}


def test_a_missing_split_names_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ROWS)
    message = fault_of(make_task(tmp_path))
    assert "validation_matched" in message and "there is: train.csv" in message


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in fault_of(make_task(tmp_path / "absent"))
    (tmp_path / "file").touch()
    assert "a file of type none; allowed is parquet" in fault_of(make_task(tmp_path / "file"))
    (tmp_path / "file.csv").write_text("premise,hypothesis,label\na,b,0\n")
    assert "is a file: expected is a folder with validation_matched." in fault_of(make_task(tmp_path / "file.csv"))


def test_missing_texts_are_empty_and_counted(tmp_path: Path) -> None:
    rows: Rows = {"premise": ["a", None, " "], "hypothesis": ["b", "c", "d"], "label": [0, 1, 2]}
    splits = load_splits(make_task(write_both(tmp_path, rows)), offline=True)
    assert splits.rows["train"][:]["premise"] == ["a", "", " "]
    assert splits.empty == {"train": {"premise": 2}, "validation_matched": {"premise": 2}}


def test_training_subsets_are_fixed_and_nested(tmp_path: Path) -> None:
    rows: Rows = {"premise": [str(n) for n in range(50)], "hypothesis": ["x"] * 50, "label": [n % 3 for n in range(50)]}
    write_both(tmp_path, rows)

    def load(train: int, evaluation: int) -> tuple[list[str], list[str]]:
        task = make_task(tmp_path, max_train_rows=train, max_eval_rows=evaluation)
        splits = load_splits(task, offline=True).rows
        return splits["train"][:]["premise"], splits["validation_matched"][:]["premise"]

    few, first = load(5, 7)
    assert few == ["28", "11", "10", "41", "2"]  # a change here changes every subsampled result
    assert first == rows["premise"][:7]
    assert load(20, 7)[0][:5] == few
    assert load(50, 99) == (rows["premise"], rows["premise"])


def test_the_fingerprint_follows_the_bytes_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_both(tmp_path / name, ROWS)
    first = fingerprint(make_task(tmp_path / "one"))
    assert first == fingerprint(make_task(tmp_path / "two", max_train_rows=3))
    assert first == load_splits(make_task(tmp_path / "one"), offline=True).fingerprint
    assert first is not None and len(first) == 16
    with (tmp_path / "two" / "train.jsonl").open("a") as stream:
        stream.write("\n")
    assert first != fingerprint(make_task(tmp_path / "two"))


def test_the_generator_needs_no_files() -> None:
    task = make_task(None, generator="story_nli", validation=["validation"], max_train_rows=9)
    splits = load_splits(task, offline=True)
    assert len(splits.rows["train"]) == 9
    assert splits.rows["validation"].column_names == ["premise", "hypothesis", "label"]
    assert splits.fingerprint == fingerprint(task)


def test_local_files_come_before_the_generator(tmp_path: Path) -> None:
    task = make_task(write_both(tmp_path, ROWS), generator="story_nli")
    assert load_splits(task, offline=True).rows["train"][:] == ROWS


class Builder:
    """Stand in for the library's builder of a data set on the hub."""

    hash = COMMIT

    def download_and_prepare(self) -> None:
        """Do nothing."""

    def as_dataset(self) -> dict[str, datasets.Dataset]:
        """Return more splits than a task asks for."""
        rows = datasets.Dataset.from_dict(ROWS | {"idx": list(range(5))})
        return dict.fromkeys(("train", "validation_matched", "test"), rows)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the hub; returns what it was asked for."""
    seen: dict[str, Any] = {}

    def build(path: str, name: str, **options: Any) -> Builder:
        seen.update(options, path=path, name=name)
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", build)
    return seen


def test_the_commit_on_the_hub_is_recorded(asked: dict[str, Any]) -> None:
    task = make_task(None)
    splits = load_splits(task, offline=False)
    assert asked == {"path": "nyu-mll/glue", "name": "mnli", "revision": "main"}
    assert splits.rows["train"][:] == ROWS
    assert (splits.revision, splits.fingerprint) == (COMMIT, f"nyu-mll/glue@{COMMIT}")
    assert fingerprint(task) is None


def test_a_repository_with_a_loading_script_is_read_from_the_hubs_parquet_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    revisions = []

    def build(path: str, name: str, *, revision: str) -> Builder:
        revisions.append(revision)
        if revision == "main":
            raise RuntimeError("Dataset scripts are no longer supported, but found glue.py")
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", build)
    assert load_splits(make_task(None), offline=False).revision == COMMIT
    assert revisions == ["main", "refs/convert/parquet"]
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: build("glue", "mnli", revision="main"))
    with pytest.raises(ConfigError, match="no longer supported"):
        load_splits(make_task(None, revision="v1"), offline=False)


def test_another_commit_than_asked_for_is_refused(asked: dict[str, Any]) -> None:
    assert load_splits(make_task(None, revision=COMMIT), offline=False).revision == COMMIT
    with pytest.raises(ConfigError, match="task.revision=fff"):
        load_splits(make_task(None, revision="f" * 40), offline=False)


def test_a_split_that_the_hub_does_not_have_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has no split dev; there is: train, validation_matched, test"):
        load_splits(make_task(None, validation=["dev"]), offline=False)


def test_offline_without_a_cache_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = ['.', 'tests']\n"
        "from tests.support.mnli_files import make_task\n"
        "from wlora.errors import ConfigError\n"
        "from wlora.data.sources import load_splits\n"
        "try: load_splits(make_task(None), offline=True)\n"
        "except ConfigError as error: print(error, 'torch' in sys.modules, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HOME": str(tmp_path), "HF_HOME": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert "nyu-mll/glue" in lines[0] and "task.path=DIR" in lines[1] and lines[2] == "False"
