"""Scores of single classes against scikit-learn and seqeval, and how they are shown."""

from __future__ import annotations

import numpy as np
import pytest
from seqeval.metrics import classification_report as entity_report
from sklearn.metrics import classification_report

from wlora.metrics.classes import format_classes, score_classes, score_label_sets
from wlora.metrics.entities import mark_entities, score_entity_types, score_tags

NAMES = ["a", "b", "c"]
TRUE = np.array([0, 0, 0, 1, 1, 2])
FOUND = np.array([0, 0, 1, 1, 0, 0])


def test_scores_of_classes_are_those_of_scikit_learn() -> None:
    found = score_classes(TRUE, FOUND, NAMES)
    report = classification_report(TRUE, FOUND, target_names=NAMES, output_dict=True, zero_division=0)
    for number, name in enumerate(NAMES):
        assert found["f1"][number] == pytest.approx(report[name]["f1-score"], abs=1e-6)
        assert found["precision"][number] == pytest.approx(report[name]["precision"], abs=1e-6)
        assert found["support"][number] == report[name]["support"]
    assert found["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"], abs=1e-6)
    assert found["weighted_f1"] == pytest.approx(report["weighted avg"]["f1-score"], abs=1e-6)
    assert found["confusion"] == [[2, 1, 0], [1, 1, 0], [1, 0, 0]], "rows are the true classes"


def test_a_class_that_occurs_nowhere_does_not_lower_the_macro_mean() -> None:
    found = score_classes(np.array([0, 1]), np.array([0, 1]), NAMES)
    assert found["macro_f1"] == 1.0 and found["f1"] == [1.0, 1.0, 0.0] and found["support"] == [1, 1, 0]


def test_the_table_has_a_line_per_class_and_the_confusion_matrix() -> None:
    lines = format_classes(score_classes(TRUE, FOUND, NAMES))
    assert lines[1].split() == ["a", "0.5000", "0.6667", "0.5714", "3"]
    assert lines[-1].split() == ["c", "1", "0", "0"] and lines[-4].split()[-2:] == ["<-", "predicted"]
    assert format_classes({}) == []


def test_many_classes_are_cut_in_the_console_and_have_no_confusion_matrix_in_the_record() -> None:
    classes = np.arange(60)
    found = score_classes(classes, classes, [f"class {number}" for number in classes])
    assert "confusion" not in found and len(found["f1"]) == 60
    assert "… 30 classes more, in the record" in format_classes(found) and len(format_classes(found)) < 40


def test_scores_of_sets() -> None:
    true, found = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0]]), np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1]])
    scores = score_label_sets(["micro_f1", "macro_f1", "subset_accuracy"], true, found)
    assert scores["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert scores["subset_accuracy"] == pytest.approx(1 / 3)
    report = score_classes(true, found, NAMES)
    assert "confusion" not in report and report["support"] == [1, 2, 0]


ROWS = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "I-LOC"]]
GUESSES = [["B-PER", "I-PER", "O", "O"], ["O", "B-LOC", "O"]]


def test_entities_are_scored_as_by_seqeval() -> None:
    scores = score_tags(["f1", "precision", "recall", "accuracy"], ROWS, GUESSES)
    assert scores == pytest.approx({"f1": 0.4, "precision": 0.5, "recall": 1 / 3, "accuracy": 5 / 7})
    found, report = score_entity_types(ROWS, GUESSES), entity_report(ROWS, GUESSES, output_dict=True, zero_division=0)
    assert found["names"] == ["LOC", "PER"] and found["f1"] == [0.0, 1.0] and found["support"] == [2, 1]
    assert found["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"], abs=1e-6)
    nothing = [["O"]]
    assert score_tags(["f1", "macro_f1"], nothing, nothing) == {"f1": 0.0, "macro_f1": 0.0}
    report = score_entity_types(nothing, nothing)
    assert report["names"] == [] and report["macro_f1"] == report["weighted_f1"] == 0.0


def test_last_and_unit_tags_end_an_entity() -> None:
    two = [["U-PER", "U-PER", "O"]]
    assert score_tags(["f1"], two, [["B-PER", "L-PER", "O"]]) == {"f1": 0.0}, "one entity of two tokens"
    assert score_tags(["f1"], two, [["U-PER", "O", "O"]]) == {"f1": pytest.approx(2 / 3)}
    assert score_entity_types(two, two)["support"] == [2]


@pytest.mark.parametrize(
    ("names", "entities"), [(["O", "B-X"], True), (["S-X", "O"], True), (["NOUN", "VERB"], False), (["O", "X"], False)]
)
def test_tags_of_entities_are_told_from_others(names: list[str], entities: bool) -> None:
    assert mark_entities(names) is entities
