"""Own tables: columns, labels and validation rows are found in the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.conftest import compose
from tests.support.hub_folder import build_table_repository
from tests.support.own_tables import KINDS, Columns, fault_of, settle, tickets, write
from wlora.config.identity import scientific_fields
from wlora.data.sources import fingerprint, load_splits


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


def sick_whole(folder: Path) -> Path:
    rows: Columns = {"pair_ID": list(range(9)), "sentence_A": ["A b c"] * 9, "sentence_B": ["D e"] * 9}
    rows |= {"entailment_label": ["NEUTRAL", "ENTAILMENT", "CONTRADICTION"] * 3, "relatedness_score": [4.5, 3, 1] * 3}
    more = ("entailment_AB", "entailment_BA", "sentence_A_original", "sentence_B_original", "SemEval_set")
    return write(folder / "SICK.TSV", rows | {name: [f"some {name}"] * 9 for name in more})


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
        (sick_whole, [], ["sentence_A", "sentence_B"], "entailment_label", ["CONTRADICTION", "ENTAILMENT", "NEUTRAL"]),
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


def test_values_answers_and_summaries_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    told = capsys.readouterr().out
    assert "values     1 to 3, mean 2.167" in told and "answers    3 questions have none" in told
    assert "task.text=[article], task.label=highlights; not used: title" in told


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
