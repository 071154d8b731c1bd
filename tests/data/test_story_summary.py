"""The synthetic summaries: reproducible, split cleanly, and right by an independent reading."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from wlora.data.synthetic import story
from wlora.data.synthetic import world as worlds
from wlora.data.synthetic.summary import SUMMARY_EVENTS, SUMMARY_ROWS

# A change here changes the data of recorded runs: raise GENERATOR_VERSION with it.
SHA256 = "55033b293dd6ff5cd8434def1c9bed652b157eaeedeef64dea283fde0297bd15"
MOVED = re.compile(r"(\w+) (?:went to|walked into|entered|arrived at) the (\w+)")
SUMMARY = re.compile(r"(\w+) is in the (\w+) and (\w+) is in the (\w+)\.")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[tuple[str, str]]]:
    made = {split: story.generate("story_summary", split) for split in worlds.SPLITS}
    return {split: list(zip(columns["document"], columns["summary"], strict=True)) for split, columns in made.items()}


def test_output_is_pinned(splits: dict[str, list[tuple[str, str]]]) -> None:
    assert hashlib.sha256(json.dumps(splits).encode()).hexdigest() == SHA256
    assert {split: len(rows) for split, rows in splits.items()} == SUMMARY_ROWS


def test_summaries_say_where_both_ended_up(splits: dict[str, list[tuple[str, str]]]) -> None:
    for rows in splits.values():
        for document, summary in rows:
            moves = MOVED.findall(document)
            where = dict(moves)  # the last place of each, in the order of their first
            (told,) = SUMMARY.findall(summary)
            assert list(where.items()) == [told[:2], told[2:]]
            assert len(moves) > 2 and document.count(".") == SUMMARY_EVENTS


def test_first_places_are_not_the_answer(splits: dict[str, list[tuple[str, str]]]) -> None:
    def right(document: str, summary: str) -> bool:
        first = dict(reversed(MOVED.findall(document)))
        return all(f"{person} is in the {place}" in summary for person, place in first.items())

    for rows in splits.values():
        assert sum(right(*row) for row in rows) < 0.15 * len(rows)


def test_splits_share_no_sentence_but_all_words(splits: dict[str, list[tuple[str, str]]]) -> None:
    found = {
        split: {sentence for row in rows for text in row for sentence in re.findall(r"[^.]+\.", text.replace(". ", "."))}
        for split, rows in splits.items()
    }
    assert not found["train"] & found["validation"]
    words = {split: set(re.findall(r"\w+", " ".join(texts))) for split, texts in found.items()}
    assert words["validation"] <= words["train"]
    assert {word.lower() for word in words["train"]} <= set(story.vocabulary())
    documents = [document for rows in splits.values() for document, _ in rows]
    assert len(documents) == len(set(documents))
