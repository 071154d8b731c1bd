"""ROUGE against figures computed by hand, and its interval against the library's."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator

from wlora.errors import ConfigError
from wlora.metrics.rouge import ROUGE_NAMES, bootstrap_interval, compute_rouge, split_sentences

PREDICTIONS = ["the cat sat on the mat", "dogs were running.", "", "one two three four five"]
REFERENCES = ["the cat lay on the mat", "The dog runs!", "an unseen word", "five four three two one"]


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """Return the scores of one document, without their intervals."""
    found = compute_rouge(ROUGE_NAMES, [prediction], [reference])
    return {name: found[name] for name in ROUGE_NAMES}


def test_one_sentence_by_hand() -> None:
    # 5 of 6 words; the bigrams "the cat", "on the", "the mat" of 5 each; the cat … on the mat in order
    expected = {"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6, "rougeLsum": 5 / 6}
    assert rouge(PREDICTIONS[0], REFERENCES[0]) == pytest.approx(expected)


def test_lengths_differ_by_hand() -> None:
    # 2 common words: precision 2/2, recall 2/4, F 2/3; one common bigram: 1/1 and 1/3, F 1/2
    assert rouge("a b", "a b c d") == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3, "rougeLsum": 2 / 3})


def test_words_are_stemmed_lower_cased_and_freed_of_punctuation() -> None:
    assert rouge("Dogs running", "dog runs.") == pytest.approx(dict.fromkeys(ROUGE_NAMES, 1.0))


def test_order_counts_for_sequences_only() -> None:
    found = rouge(PREDICTIONS[3], REFERENCES[3])
    assert found == pytest.approx({"rouge1": 1.0, "rouge2": 0.0, "rougeL": 1 / 5, "rougeLsum": 1 / 5})


@pytest.mark.parametrize("gap", ["\n", " "])
def test_sentences_in_another_order_count_for_rouge_lsum(gap: str) -> None:
    # The longest common subsequence of the whole is one sentence of 3 words; sentence by sentence all 6 are found.
    found = rouge(f"Ben saw ice.{gap}Anna ate soup.", f"Anna ate soup.{gap}Ben saw ice.")
    assert found["rougeL"] == pytest.approx(3 / 6) and found["rougeLsum"] == pytest.approx(1.0)


def test_documents_without_words_score_zero() -> None:
    for prediction, reference in [("", "a word"), ("a word", ""), ("", ""), ("…", "!")]:
        assert set(rouge(prediction, reference).values()) == {0.0}


def test_the_mean_is_over_documents_and_equals_the_library() -> None:
    scorer = RougeScorer(list(ROUGE_NAMES), use_stemmer=True)
    each = [scorer.score(reference, prediction) for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True)]
    found = compute_rouge(ROUGE_NAMES, PREDICTIONS, REFERENCES)
    for name in ROUGE_NAMES:
        assert found[name] == pytest.approx(np.mean([scores[name].fmeasure for scores in each]))
        assert 0 <= found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] <= 1
    assert set(found) == {f"{name}{end}" for name in ROUGE_NAMES for end in ("", "_low", "_high")}


def test_the_interval_is_the_librarys_for_the_same_draws() -> None:
    scorer, aggregator = RougeScorer(["rouge1"], use_stemmer=True), BootstrapAggregator()
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        aggregator.add_scores(scorer.score(reference, prediction))
    before = np.random.get_state()
    np.random.seed(0)
    theirs = aggregator.aggregate()["rouge1"]
    np.random.set_state(before)
    ours = compute_rouge(["rouge1"], PREDICTIONS, REFERENCES)
    assert (ours["rouge1_low"], ours["rouge1_high"]) == pytest.approx((theirs.low.fmeasure, theirs.high.fmeasure))


def test_the_interval_is_reproducible_and_moves_no_other_random_stream() -> None:
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    scores = np.linspace(0, 1, 50)[:, None]
    first, again = bootstrap_interval(scores), bootstrap_interval(scores)
    assert np.random.rand() == expected
    assert [bound.tolist() for bound in first] == [bound.tolist() for bound in again]
    # About 1.96 standard errors to both sides of the mean.
    error = scores.std() / np.sqrt(50)
    assert first[0][0] == pytest.approx(0.5 - 1.96 * error, abs=0.01)
    assert first[1][0] == pytest.approx(0.5 + 1.96 * error, abs=0.01)


def test_sentences_end_at_stops_and_line_breaks() -> None:
    assert split_sentences('He said "No." Then\n\nshe left!  (Why?) 3.5 m ') == [
        'He said "No."',
        "Then",
        "she left!",
        "(Why?)",
        "3.5 m",
    ]
    assert split_sentences(" \n ") == []


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean rougeL"):
        compute_rouge(["rogueL"], ["a"], ["a"])


def test_nothing_is_downloaded() -> None:
    code = (
        "import socket; socket.socket.connect = None\n"
        "from wlora.metrics.rouge import compute_rouge\n"
        "print(compute_rouge(['rougeLsum'], ['a b. c'], ['a b. c'])['rougeLsum'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1.0", done.stderr
