"""`story_summary`: where the two people of a small story end up, in one sentence.

A document tells of two people who walk about, take, give and talk of things and places, in another order each time;
its summary names the last place of both, the first to go anywhere first. At least one of them goes to two places, and
places are talked about, so that naming any place of the document is not enough.

The summary has one wording, for only what it says is to be learnt. Like every sentence of the documents, a summary
(its people and places together) belongs to one split.
"""

from __future__ import annotations

import random
from typing import Any

from wlora.tasks.story import PEOPLE, PLACES, THINGS, Event, World, pick, pick_two, render, split_of

SUMMARY = "{person} is in the {place} and {other} is in the {where}."

ROWS = {"train": 3000, "validation": 200}
EVENTS = 4
_KINDS = ("go", "go", "go", "take", "give", "mention")


def summary_columns(split: str, rng: random.Random) -> dict[str, list[Any]]:
    """Return the columns `document` and `summary` of one split; no document comes twice."""
    rows: dict[str, str] = {}
    while len(rows) < ROWS[split]:
        world = _random_world(rng)
        summary = _summarize(world)
        if summary is not None and split_of(0, *_facts(world)) == split:
            rows[" ".join(render(event, split, rng) for event in world.history)] = summary
    return {"document": list(rows), "summary": list(rows.values())}


def _random_world(rng: random.Random) -> World:
    """Let a few random events happen to two people."""
    people, things = pick_two(rng, PEOPLE), pick_two(rng, THINGS)
    places = (*pick_two(rng, PLACES), pick(rng, PLACES))
    items = {"go": places, "take": things, "give": things, "mention": places + things}
    world = World()
    while len(world.history) < EVENTS:
        kind = pick(rng, _KINDS)
        person, other = pick_two(rng, people)
        event = Event(kind, person, pick(rng, items[kind]), other if kind == "give" else "")
        if world.allows(event):
            world.apply(event)
    return world


def _facts(world: World) -> list[str]:
    """Return person, place, person, place, in the order in which they first went anywhere."""
    return [name for fact in world.place_of.items() for name in fact]


def _summarize(world: World) -> str | None:
    """Say where both people are; None where that is unknown, or each went to one place only."""
    moves = sum(event.kind == "go" for event in world.history)
    if len(world.place_of) < 2 or moves < 3:
        return None
    person, place, other, where = _facts(world)
    return SUMMARY.format(person=person, place=place, other=other, where=where)
