"""`story_summary`: the last places of the two people of a small story, in one sentence.

A document describes the actions of two people. The summary names the last place of both; the person who moves first is named
first. At least one of them moves twice, so the first places are not the answer. Other sentences are about things, or only
mention a place.

All summaries have the same wording, so that only the content must be learnt. Every summary (its people and places together)
belongs to one split, like every sentence of the documents (see `world`).
"""

from __future__ import annotations

import random
from typing import Any

from wlora.data.synthetic.world import World, random_world, render, split_of

SUMMARY = "{person} is in the {place} and {other} is in the {where}."

SUMMARY_ROWS = {"train": 3000, "validation": 200}
SUMMARY_EVENTS = 4
SUMMARY_KINDS = ("go", "go", "go", "take", "give", "mention")


def summary_columns(split: str, rng: random.Random) -> dict[str, list[Any]]:
    """Return the columns of one split: document, summary. No document occurs twice."""
    rows: dict[str, str] = {}
    while len(rows) < SUMMARY_ROWS[split]:
        world = random_world(rng, SUMMARY_EVENTS, SUMMARY_KINDS)
        facts = [name for person_and_place in world.place_of.items() for name in person_and_place]
        if _tells_enough(world) and split_of(0, *facts) == split:
            document = " ".join(render(event, split, rng) for event in world.history)
            rows[document] = SUMMARY.format(**dict(zip(("person", "place", "other", "where"), facts, strict=True)))
    return {"document": list(rows), "summary": list(rows.values())}


def _tells_enough(world: World) -> bool:
    """Tell whether the places of both people are known, and at least one person has moved twice."""
    return len(world.place_of) == 2 and sum(event.kind == "go" for event in world.history) > 2
