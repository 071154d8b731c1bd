"""`story_qa`: questions over the small worlds of `story`, with and without an answer, in the schema of SQuAD v2.

A context describes a few events. The question is where a person is or who has a thing. The answer is the place or name in
the last sentence that determines it.

**Splits.** Every question belongs to one split, like every sentence (`world.split_of`). No sentence is in both splits.

**Shortcuts.** Rows are generated in groups of three: one question with three stories, two with different answers and one
without an answer. All three mention the subject of the question, have the same number of sentences, and name at least two
possible answers. Therefore neither the question nor the names in the story give information about the answer. It depends
only on who did what and when.
"""

from __future__ import annotations

import random
from typing import Any

from wlora.data.synthetic.world import PEOPLE, THINGS, World, pick, random_world, render, split_of

QUESTION_TEMPLATES = {
    "where": (
        "Where is {name}?",
        "Where is {name} now?",
        "Where can you find {name}?",
        "In which place is {name}?",
    ),
    "who": (
        "Who has the {name}?",
        "Who has the {name} now?",
        "Who holds the {name}?",
        "Who is holding the {name}?",
    ),
}

QA_TRIPLES = {"train": 800, "validation": 120}
QA_EVENTS = 3
QA_KINDS = ("go", "go", "go", "take", "take", "give", "mention", "mention")

Answers = dict[str, list[Any]]


def qa_columns(split: str, rng: random.Random) -> dict[str, list[Any]]:
    """Return the columns of one split: id, title, context, question, answers."""
    rows: dict[tuple[str, str], Answers] = {}
    while len(rows) < 3 * QA_TRIPLES[split]:
        kind = pick(rng, list(QUESTION_TEMPLATES))
        name = pick(rng, PEOPLE if kind == "where" else THINGS)
        question = pick(rng, [t for i, t in enumerate(QUESTION_TEMPLATES[kind]) if split_of(i, name) == split])
        question = question.format(name=name)
        told = _tell_triple(split, rng, kind, name)
        if not any((context, question) in rows for context, _ in told):
            rows |= {(context, question): answers for context, answers in told}
    shuffled = sorted(rows.items(), key=lambda _: rng.random())
    return {
        "id": [f"{split}-{number}" for number in range(len(shuffled))],
        "title": ["story"] * len(shuffled),
        "context": [context for (context, _), _ in shuffled],
        "question": [question for (_, question), _ in shuffled],
        "answers": [answers for _, answers in shuffled],
    }


def _tell_triple(split: str, rng: random.Random, kind: str, name: str) -> list[tuple[str, Answers]]:
    """Generate two stories with different answers to a question and one without an answer, each with its answers."""
    told: dict[str, tuple[str, Answers]] = {}
    while len(told) < 3:
        given = {"person": name} if kind == "where" else {"thing": name}
        world = random_world(rng, QA_EVENTS, QA_KINDS, **given)
        answer = (world.place_of if kind == "where" else world.holder_of).get(name, "")
        wanted = answer not in told and (not answer or len(told.keys() - {""}) < 2)
        if wanted and world.mentions(name) and _count_options(world, kind) > 1:
            told[answer] = _tell(world, split, rng, kind, name, answer)
    return list(told.values())


def _count_options(world: World, kind: str) -> int:
    """Count the names in a story that are possible answers to a question of this kind."""
    if kind == "where":
        return len({event.item for event in world.history if event.kind in ("go", "mention")} - set(THINGS))
    return len({person for event in world.history for person in (event.person, event.other)} - {""})


def _tell(world: World, split: str, rng: random.Random, kind: str, name: str, answer: str) -> tuple[str, Answers]:
    """Render a story and locate the answer in the last sentence that determines it; a place also with its article."""
    sentences = [render(event, split, rng) for event in world.history]
    context = " ".join(sentences)
    if not answer:
        return context, {"text": [], "answer_start": []}
    decisive = ("go",) if kind == "where" else ("take", "give")
    last = max(i for i, e in enumerate(world.history) if e.kind in decisive and name in (e.person, e.item))
    start = len(" ".join([*sentences[:last], ""])) + sentences[last].index(answer)
    if kind == "where":
        return context, {"text": [answer, f"the {answer}"], "answer_start": [start, start - len("the ")]}
    return context, {"text": [answer], "answer_start": [start]}
