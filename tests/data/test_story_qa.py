"""The synthetic questions: reproducible, answers where they stand, split cleanly, without shortcuts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from typing import Any

import pytest

from wlora.data.synthetic import story
from wlora.data.synthetic import world as worlds
from wlora.data.synthetic.qa import QA_TRIPLES, QUESTION_TEMPLATES

Columns = dict[str, list[Any]]

# A change here changes the data of recorded runs: raise GENERATOR_VERSION with it.
SHA256 = "714db52f808887e3515990920bf4e43dff034523b24795882c46b0befd82ab85"


@pytest.fixture(scope="module")
def splits() -> dict[str, Columns]:
    return {split: story.generate("story_qa", split) for split in worlds.SPLITS}


def rows(columns: Columns) -> list[tuple[str, str, dict[str, Any]]]:
    return list(zip(columns["context"], columns["question"], columns["answers"], strict=True))


def answer_from_text(context: str, question: str) -> str:
    """Answer a question from its text alone, by string matching independent of the generator's world."""
    name = next(word for word in re.findall(r"\w+", question) if word in worlds.PEOPLE + worlds.THINGS)
    found = ""
    for sentence in context.rstrip(".").split(". "):
        if moved := re.fullmatch(rf"{name} (?:went to|walked into|entered|arrived at) the (\w+)", sentence):
            found = moved[1]
        if held := re.fullmatch(rf"(\w+) (?:took|picked up|grabbed|found) the {name}", sentence):
            found = held[1]
        if given := re.fullmatch(rf"\w+ (?:gave|handed) the {name} to (\w+)", sentence):
            found = given[1]
        if got := re.fullmatch(rf"(\w+) (?:got|received) the {name} from \w+", sentence):
            found = got[1]
    return found


def test_output_is_pinned(splits: dict[str, Columns]) -> None:
    text = json.dumps([splits[split] for split in worlds.SPLITS])
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256


def test_answers_stand_where_they_are_said_to_stand(splits: dict[str, Columns]) -> None:
    for columns in splits.values():
        for context, _, answers in rows(columns):
            for text, start in zip(answers["text"], answers["answer_start"], strict=True):
                assert context[start : start + len(text)] == text


def test_answers_agree_with_an_independent_reading(splits: dict[str, Columns]) -> None:
    for columns in splits.values():
        for context, question, answers in rows(columns):
            assert (answers["text"] or [""])[0] == answer_from_text(context, question), (context, question)


def test_an_answer_is_the_last_place_that_decides_it() -> None:
    context = "Anna went to the bank. Ben entered the school. Anna entered the school."
    assert answer_from_text(context, "Where is Anna?") == "school"
    for context, question, answers in rows(story.generate("story_qa", "train")):
        if answers["text"]:
            later = context[answers["answer_start"][0] :].partition(". ")[2]
            assert answer_from_text(later, question) == ""


def test_every_question_is_answered_twice_and_left_open_once(splits: dict[str, Columns]) -> None:
    for split, columns in splits.items():
        assert len(columns["id"]) == 3 * QA_TRIPLES[split] == len(set(columns["id"]))
        asked = Counter((question, bool(answers["text"])) for _, question, answers in rows(columns))
        for question in set(columns["question"]):
            assert asked[question, True] == 2 * asked[question, False] > 0
        pairs = [row[:2] for row in rows(columns)]
        assert len(pairs) == len(set(pairs))


def test_neither_length_nor_names_tell_the_answer(splits: dict[str, Columns]) -> None:
    for columns in splits.values():
        for context, question, answers in rows(columns):
            assert context.count(".") == 3
            names = set(re.findall(r"\w+", context))
            asked = next(word for word in re.findall(r"\w+", question) if word in worlds.PEOPLE + worlds.THINGS)
            assert asked in names
            options = worlds.PLACES if asked in worlds.PEOPLE else worlds.PEOPLE
            assert len(names & set(options)) >= 2
            assert not answers["text"] or answers["text"][0] in options


def test_splits_share_words_but_no_sentence(splits: dict[str, Columns]) -> None:
    def sentences(columns: Columns) -> set[str]:
        told = {sentence for context in columns["context"] for sentence in context.rstrip(".").split(". ")}
        return told | set(columns["question"])

    train, validation = (sentences(splits[split]) for split in worlds.SPLITS)
    assert not train & validation
    words = [set(re.findall(r"\w+", " ".join(part))) for part in (train, validation)]
    assert words[0] == words[1]
    assert {word.lower() for word in words[0]} <= set(story.vocabulary())


def test_every_question_has_room_in_both_splits() -> None:
    assert all(len(texts) >= worlds.SPLIT_MODULUS for texts in QUESTION_TEMPLATES.values())
