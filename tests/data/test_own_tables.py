"""Own tables: columns, labels and validation rows are found in the data, and what cannot be a task is refused in a line."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import compose
from tests.support.hub_folder import build_table_repository
from wlora.config.identity import scientific_fields
from wlora.config.schema import TaskConfig
from wlora.data.sources import fingerprint, load_splits
from wlora.errors import ConfigError

Columns = dict[str, list[Any]]
KINDS = ("bug", "praise", "question")


def write(file: Path, columns: Columns, delimiter: str | None = None) -> Path:
    """Write columns in the format of the file's extension."""
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if file.suffix == ".parquet":
        pq.write_table(pa.table(columns), file)
    elif file.suffix in (".json", ".jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, list(columns), delimiter=delimiter or ("\t" if file.suffix == ".tsv" else ","))
            writer.writeheader()
            writer.writerows(rows)
    return file


def tickets(number: int = 60, **more: list[Any]) -> Columns:
    """Return an unbalanced table with an identifier, a text with commas, quotes and line breaks, and a class."""
    kinds = [KINDS[0 if row % 6 else 1 + row // 6 % 2] for row in range(number)]
    texts = [f'It says: "{kind}",\nagain ({row})' for row, kind in enumerate(kinds)]
    return {"id": [f"T-{row}" for row in range(number)], "text": texts, "category": kinds, **more}


def settle(path: Path | str, *words: str, task: str = "text_classification") -> TaskConfig:
    """Return the task as a run gets it."""
    return compose(f"task={task}", "model=tiny_bert", f"task.path={path}", *words).task  # type: ignore[no-any-return]


def fault_of(*words: str, path: Path, task: str = "text_classification") -> str:
    """Return the message that a request ends with, before training, after checking its form."""
    with pytest.raises(ConfigError) as caught:
        load_splits(settle(path, *words, task=task), offline=True)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 2 and "task." in message
    return message


def test_a_table_needs_nothing_but_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = settle(write(tmp_path / "tickets.csv", tickets()))
    assert (task.columns, task.label, task.labels) == (["text"], "category", list(KINDS))
    assert task.validation == ["0.1"]
    told = capsys.readouterr().out
    assert "60 rows, task.text=[text], task.label=category; not used: id" in told
    assert "bug 50, praise 5, question 5" in told and "10% of the training rows" in told
    rows = load_splits(task, offline=True).rows
    assert len(rows["train"]) == 54 and len(rows["0.1"]) == 6
    both = rows["train"]["text"][:] + rows["0.1"]["text"][:]
    assert sorted(both) == sorted(tickets()["text"]), "every row once, with its commas, quotes and line breaks"


def sick(folder: Path) -> Path:
    rows: Columns = {"pair_ID": [1, 2, 3, 4] * 5, "sentence_A": ["A b c"] * 20, "sentence_B": ["D e"] * 20}
    rows |= {"relatedness_score": [4.5, 3.2, 1.0, 2.2] * 5}
    return write(
        folder / "SICK.tsv", rows | {"entailment_judgment": ["NEUTRAL", "ENTAILMENT", "CONTRADICTION", "NEUTRAL"] * 5}
    )


def boolq(folder: Path) -> Path:
    rows: Columns = {"question": ["is it so"] * 20, "title": ["T"] * 20, "answer": [True, False] * 10}
    return write(folder / "boolq.jsonl", rows | {"passage": ["It is so."] * 20})


def cb(folder: Path) -> Path:
    rows: Columns = {"premise": ["A b."] * 20, "hypothesis": ["B c"] * 20, "idx": list(range(20))}
    names = ["contradiction", "entailment"] * 9 + ["neutral"] * 2
    return write(folder / "cb.json", rows | {"label": names})


def quora(folder: Path) -> Path:
    rows: Columns = {"id": list(range(8)), "question1": ["a b"] * 8, "question2": ["c d"] * 8, "label": [0, 1] * 4}
    return write(folder / "pairs.parquet", rows)


def unusual(folder: Path) -> Path:
    rows: Columns = {"kunde": ["K1", "K2"] * 10, "anliegen": [f"Wo ist Paket {n}" for n in range(20)]}
    return write(folder / "faelle.csv", rows | {"nr": list(range(20)), "art": ["frage", "lob"] * 10}, ";")


@pytest.mark.parametrize(
    ("make", "words", "columns", "label", "labels"),
    [
        (sick, [], ["sentence_A", "sentence_B"], "entailment_judgment", ["CONTRADICTION", "ENTAILMENT", "NEUTRAL"]),
        (boolq, [], ["question", "passage"], "answer", ["false", "true"]),
        (cb, [], ["premise", "hypothesis"], None, ["contradiction", "entailment", "neutral"]),
        (quora, [], ["question1", "question2"], None, ["0", "1"]),
        (unusual, ["task.label=art"], ["anliegen"], "art", ["frage", "lob"]),
        (unusual, ["task.text=anliegen", "task.label=kunde"], ["anliegen"], "kunde", ["K1", "K2"]),
    ],
)
def test_columns_and_labels_are_found_in_tables_of_many_shapes(
    make: Callable[[Path], Path], words: list[str], columns: list[str], label: str | None, labels: list[str], tmp_path: Path
) -> None:
    task = settle(make(tmp_path), *words)
    assert (task.columns, task.label, task.labels) == (columns, label, labels)
    splits = load_splits(task, offline=True).rows
    assert set(splits["train"]["label"][:]) == set(range(len(labels)))


@pytest.mark.parametrize("make", [sick, boolq, cb])
def test_benchmarks_train_in_their_own_schema(
    make: Callable[[Path], Path], run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    words = [f"task.path={make(tmp_path)}", "task=text_classification", "task.epochs=9", "method=lora", "train.max_steps=16"]
    record = run_tiny(*words)
    assert record.status == "success" and sum(record.classes["support"]) == 2
    assert record.classes["names"] == record.config["task"]["labels"]


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        ([3, 1, 2, 10] * 3, ["1", "2", "3", "10"]),
        (["10", "2", "1", "2"] * 3, ["1", "2", "10"]),
        ([1.0, 0.0, 1.0, 0.0] * 3, ["0", "1"]),
        ([True, False, False, True] * 3, ["false", "true"]),
        (["b ", "a", "B", "a"] * 3, ["B", "a", "b"]),
    ],
)
def test_labels_of_every_type_are_counted_and_read_back(cells: list[Any], labels: list[str], tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", {"text": ["a b"] * len(cells), "label": cells})
    task = settle(file)
    assert task.labels == labels
    rows = load_splits(task, offline=True).rows
    found = Counter(labels[number] for split in rows.values() for number in split["label"][:])
    spelled = [
        str(c).lower() if isinstance(c, bool) else f"{c:g}" if isinstance(c, float) else str(c).strip() for c in cells
    ]
    assert found == Counter(spelled)


def test_class_names_that_a_file_stores_keep_their_order(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "maybe", "yes"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a b"] * 8, "label": [2, 0] * 4}, features=features)
    rows.to_parquet(tmp_path / "t.parquet")
    task = settle(tmp_path / "t.parquet")
    assert task.labels == ["no", "maybe", "yes"]
    assert set(load_splits(task, offline=True).rows["train"]["label"][:]) == {0, 2}


def test_given_labels_must_match(tmp_path: Path) -> None:
    file = write(tmp_path / "tickets.csv", tickets())
    assert settle(file, "task.labels=[question,bug,praise]").labels == ["question", "bug", "praise"]
    message = fault_of("task.labels=[bug,praise]", path=file)
    assert "column category: question not among task.labels=[bug,praise]\nthe column holds bug, praise, question" in message


def test_validation_may_be_a_file_a_share_or_folds(tmp_path: Path) -> None:
    file, dev = write(tmp_path / "tickets.csv", tickets()), write(tmp_path / "dev.tsv", tickets(12, text=["x y"] * 12))
    task = settle(file, f"task.validation={dev}")
    assert (task.validation, task.validation_path) == (["validation"], str(dev))
    rows = load_splits(task, offline=True).rows
    assert (len(rows["train"]), len(rows["validation"])) == (60, 12)
    before = fingerprint(task)
    write(dev, tickets(13, text=["x z"] * 13))
    assert fingerprint(task) != before, "the content of the validation file counts"
    assert len(load_splits(settle(file, "task.validation=0.25"), offline=True).rows["0.25"]) == 15
    seen: list[str] = []
    for fold in range(5):
        task = settle(file, 'task.validation="folds=5"', f"task.fold={fold}")
        rows = load_splits(task, offline=True).rows
        seen += rows["folds=5"]["text"][:]
        assert Counter(rows["folds=5"]["label"][:]) == {0: 10, 1: 1, 2: 1}, "stratified"
    assert sorted(seen) == sorted(tickets()["text"]), "every row is in one fold"


def test_the_split_is_seeded_and_part_of_the_identity(tmp_path: Path) -> None:
    file = write(tmp_path / "tickets.csv", tickets())

    def held(*words: str) -> list[str]:
        task = settle(file, *words)
        return list(load_splits(task, offline=True).rows[task.validation[0]]["text"][:])

    def fields(*words: str) -> dict[str, Any]:
        config = compose("task=text_classification", "model=tiny_bert", f"task.path={file}", *words)
        return scientific_fields(config, task_data="x", model_data=None, precision="fp32")

    assert held() == held("seed=3") == held("task.max_train_rows=8"), "the same for every seed and limit"
    assert held() != held("task.split_seed=1")
    several = [fields(*words) for words in ([], ["task.validation=0.2"], ["task.split_seed=1"])]
    several += [fields('task.validation="folds=3"', f"task.fold={fold}") for fold in range(2)]
    assert all(several[i] != several[j] for i in range(5) for j in range(i))
    assert fields("task.text=[text]", "task.label=category") == several[0], "named or found, it is the same run"
    moved = tmp_path / "renamed.csv"
    file.rename(moved)
    before, file = several[0], moved
    assert fields() == before, "the name of the file does not count"


def test_a_folder_may_hold_shards_of_any_name_and_a_validation_file(tmp_path: Path) -> None:
    for part in "ab":
        write(tmp_path / f"part-{part}.csv", tickets(30))
    write(tmp_path / "dev.csv", tickets(9))
    write(tmp_path / "test.csv", tickets(5))
    task = settle(tmp_path)
    assert task.validation == ["dev"]
    rows = load_splits(task, offline=True).rows
    assert (len(rows["train"]), len(rows["dev"])) == (60, 9)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_numbered_shards_of_every_type_are_read(suffix: str, tmp_path: Path) -> None:
    for part in range(2):
        columns = tickets(30, text=[f"a b {part}"] * 30)
        write(tmp_path / f"train-{part:05}-of-00002.{suffix}", columns)
    rows = load_splits(settle(tmp_path), offline=True).rows
    assert len(rows["train"]) + len(rows["0.1"]) == 60


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_other_delimiters_are_found_in_the_header(delimiter: str, tmp_path: Path) -> None:
    task = settle(write(tmp_path / "tickets.csv", tickets(), delimiter))
    assert load_splits(task, offline=True).rows["train"]["text"][0].startswith('It says: "')


def test_a_data_set_of_the_hub_needs_no_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("wlora.experiment.resolve.require_sources", lambda config: None)
    build_table_repository(tmp_path / "owner" / "tickets", {"train": tickets(40), "validation": tickets(12)})
    task = compose("task=text_classification", "model=tiny_bert", "task.hub_id=owner/tickets").task
    assert (task.columns, task.labels, task.validation) == (["text"], list(KINDS), ["validation"])
    rows = load_splits(task, offline=False).rows
    assert (len(rows["train"]), len(rows["validation"])) == (40, 12)


def test_values_answers_and_summaries_are_found(tmp_path: Path) -> None:
    values = settle(write(tmp_path / "v.csv", {"review": ["a b"] * 9, "stars": [1, 2.5, 3] * 3}), task="text_regression")
    assert (values.columns, values.label, values.labels) == (["review"], "stars", [])
    assert set(load_splits(values, offline=True).rows["train"]["label"][:]) == {1.0, 2.5, 3.0}
    rows: Columns = {"question": ["who"] * 9, "context": ["Anna left."] * 9, "answer": ["Anna", "", "left"] * 3}
    words = ("task.max_length=64", "task.stride=8")
    asked = settle(write(tmp_path / "q.csv", rows), *words, task="question_answering")
    assert asked.unanswerable and asked.label == "answer" and "HasAns_f1" in asked.metrics
    answers = load_splits(asked, offline=True).rows["train"]["answers"][:]
    assert {"text": ["left"], "answer_start": [5]} in answers and {"text": [], "answer_start": []} in answers
    file = write(tmp_path / "s.csv", {"article": ["a b c"] * 9, "title": ["t"] * 9, "highlights": ["a"] * 9})
    found = compose("task=summarization", "model=tiny_bart", "task.max_length=64", f"task.path={file}").task
    assert found.columns == ["article", "highlights"] and found.label == "highlights"


BAD: dict[str, tuple[str, Columns, list[str], list[str]]] = {
    "a label that occurs once": (
        "text_classification",
        tickets(category=["bug"] * 30 + ["praise"] * 29 + ["rare"]),
        [],
        ["task.validation=0.1: the label rare occurs once (row 59)", "way out: merge or remove it"],
    ),
    "10,000 labels": (
        "text_classification",
        {"text": ["a b"] * 10_000, "label": [f"user {n}" for n in range(10_000)]},
        [],
        ["column label: 10,000 different labels in 10,000 rows; allowed are at most 1,000"],
    ),
    "one label": ("text_classification", tickets(category=["bug"] * 60), [], ["only the label 'bug' in 60 rows"]),
    "a missing column": (
        "text_classification",
        tickets(),
        ["task.label=categry"],
        ["task.label=categry is unknown; did you mean category?"],
    ),
    "a missing text column": (
        "text_classification",
        tickets(),
        ["task.text=[body]"],
        ["task.text=body is unknown", "id, text"],
    ),
    "an unclear text": (
        "text_classification",
        {"a": ["x y", "z w"] * 4, "b": ["k l", "m n"] * 4, "label": [0, 1] * 4},
        [],
        ["which column is the text is not clear: add task.text=[COLUMN]\nthere is: a, b, label"],
    ),
    "a null column": (
        "text_classification",
        tickets(category=[None] * 60),
        [],
        ["column category: all 60 rows are empty (null)"],
    ),
    "null texts": ("text_classification", tickets(text=[None] * 60), [], ["column text", "all 60 rows are empty (null)"]),
    "a null label": (
        "text_classification",
        tickets(category=[None, *["a", "b"] * 29, None]),
        [],
        ["row 0, one of 2, is empty (null)"],
    ),
    "a nested column": (
        "text_classification",
        tickets(category=[{"a": 1}] * 60),
        [],
        ["column category holds struct<a: int64>"],
    ),
    "lists of labels": (
        "text_classification",
        tickets(category=[["a"], ["b"]] * 30),
        [],
        ["row 0 has a list", "task=multi_label"],
    ),
    "mixed types": (
        "text_classification",
        tickets(category=["a", 7] * 30),
        [],
        ["column category: row 1 has int; expected is str"],
    ),
    "a megabyte": ("text_classification", tickets(text=["x" * (1 << 20) + "y"] * 60), [], ["row 0 has 1,048,577 bytes"]),
    "a text and label in one": (
        "text_classification",
        tickets(),
        ["task.text=category", "task.label=category"],
        ["cannot be both"],
    ),
    "a large share": (
        "text_classification",
        tickets(),
        ["task.validation=0.7"],
        ["task.validation=0.7: allowed is a file, a share up to 0.5"],
    ),
    "a whole number": (
        "text_classification",
        tickets(),
        ["task.validation=5"],
        ["task.validation=5: allowed is a file, a share"],
    ),
    "one fold": ("text_classification", tickets(), ['task.validation="folds=1"'], ["task.validation=folds=1: allowed is"]),
    "a fold too many": (
        "text_classification",
        tickets(),
        ['task.validation="folds=3"', "task.fold=3"],
        ["task.fold=3: allowed is 0 to 2"],
    ),
    "a fold of nothing": ("text_classification", tickets(), ["task.fold=0"], ["task.fold=0: allowed is null"]),
    "no such file": (
        "text_classification",
        tickets(),
        ["task.validation=dev.csv"],
        ["task.validation=dev.csv: the file does not exist"],
    ),
    "weights of values": (
        "text_regression",
        {"text": ["a b"] * 9, "score": [1.5, 2.0, 3.0] * 3},
        ["task.class_weights=balanced"],
        ["task.class_weights=balanced: allowed is none"],
    ),
    "words for values": (
        "text_regression",
        {"text": ["a b"] * 4, "score": ["1", "2", "high", "3"]},
        [],
        ["column score: row 2 has 'high'; allowed are finite numbers"],
    ),
    "an answer elsewhere": (
        "question_answering",
        {"question": ["who"] * 4, "context": ["Anna left."] * 4, "answer": ["Anna", "Anna", "Ben", "Anna"]},
        ["task.max_length=64", "task.stride=8"],
        ["column answer: row 2 has the answer 'Ben', which is not in its context"],
    ),
    "tags too few": (
        "token_classification",
        {"tokens": [["a", "b"]] * 4, "tags": [["O", "B-X"]] * 3 + [["O"]]},
        [],
        ["column tags: row 3 has 1 labels for 2 tokens"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_table_that_cannot_be_a_task_is_refused(case: str, tmp_path: Path) -> None:
    task, columns, words, parts = BAD[case]
    message = fault_of(*words, path=write(tmp_path / "t.jsonl", columns), task=task)
    assert all(part in message for part in parts), message


def test_files_of_different_schema_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", tickets())
    write(tmp_path / "b.csv", {"text": ["x y"] * 4, "kind": ["a", "b"] * 2})
    message = fault_of(path=tmp_path)
    assert "b.csv: no column id, which a.csv has\nexpected are files with the same columns" in message
    (tmp_path / "b.csv").rename(tmp_path / "dev.csv")
    assert "dev.csv: no column category" in fault_of(path=tmp_path)


def test_a_table_without_a_source_is_refused(run_main: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = run_main("task=text_classification", "model=tiny_bert")
    assert code == 2 and error.startswith("error: task=text_classification reads a table of yours: add task.path=FILE")


def test_a_yaml_of_three_lines_names_a_table(
    run_main: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tickets.csv", tickets())
    (tmp_path / "my" / "task").mkdir(parents=True)
    (tmp_path / "my" / "task" / "tickets.yaml").write_text(
        "defaults: [text_classification]\nname: tickets\npath: tickets.csv\n"
    )
    code, told, error = run_main("--config-dir=my", "task=tickets", "model=tiny_bert", "dry_run=true")
    assert code == 0, error
    assert "labels     bug 50, praise 5, question 5" in told and "(54 rows" in told
