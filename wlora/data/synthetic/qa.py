"""`story_qa`: questions over the small worlds of `story`, with and without an answer, in the schema of SQuAD v2.

A context tells a few events; the question is where a person is or who has a thing, and the answer the place or name
in the last sentence that decides it.

**Splits.** Questions belong to splits as all sentences do (`story.split_of`): no sentence is in both.

**Shortcuts.** Rows come in threes: one question over three stories, two with different answers and one that leaves it
open. All mention what is asked about, have equally many sentences and name at least two possible answers. So neither
the question nor the names in the story tell the answer, or that there is none; what is left is who did what, and when.
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
    """Tell two stories with different answers to a question and one without, each with its answers."""
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
    """Count the names in a story that a question of this kind could have as its answer."""
    if kind == "where":
        return len({event.item for event in world.history if event.kind in ("go", "mention")} - set(THINGS))
    return len({person for event in world.history for person in (event.person, event.other)} - {""})


def _tell(world: World, split: str, rng: random.Random, kind: str, name: str, answer: str) -> tuple[str, Answers]:
    """Render a story, and point at the answer in the last sentence that decides it; a place also with its article."""
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
