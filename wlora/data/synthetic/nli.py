"""`story_nli`: whether a claim about a small world follows from a story, contradicts it, or is left open.

Rows come in threes: one hypothesis under three stories, one for each label, all
with equally many events and all mentioning the person and the place in question. So the hypothesis, the
number of sentences and whether its names return tell nothing. The premise's words alone remain a hint (where
nobody goes anywhere, all is open) worth about 0.65 accuracy; the rest takes knowing who did what, and when.
"""

from __future__ import annotations

import random
from typing import Any

from wlora.data.synthetic.world import PEOPLE, PLACES, Claim, pick, random_world, render

# Sized for a demo: two events are what a 6-layer encoder learns to follow in a minute or so on a CPU.
NLI_TRIPLES = {"train": 600, "validation": 120}
NLI_EVENTS = 2
NLI_KINDS = ("go", "go", "go", "take", "give", "mention", "mention")


def nli_columns(split: str, rng: random.Random) -> dict[str, list[Any]]:
    """Return the columns of one split: premise, hypothesis, label. No pair comes twice."""
    rows: dict[tuple[str, str], int] = {}
    while len(rows) < 3 * NLI_TRIPLES[split]:
        claim = Claim(pick(rng, PEOPLE), pick(rng, PLACES))
        hypothesis = render(claim, split, rng)
        labelled: dict[int, str] = {}
        while len(labelled) < 3:
            world = random_world(rng, NLI_EVENTS, NLI_KINDS, person=claim.person, place=claim.place)
            label = world.judge(claim)
            if label not in labelled and world.mentions(claim.person) and world.mentions(claim.place):
                premise = " ".join(render(event, split, rng) for event in world.history)
                if (premise, hypothesis) not in rows:
                    labelled[label] = premise
        rows |= {(premise, hypothesis): label for label, premise in labelled.items()}
    shuffled = sorted(rows.items(), key=lambda _: rng.random())
    return {
        "premise": [premise for (premise, _), _ in shuffled],
        "hypothesis": [hypothesis for (_, hypothesis), _ in shuffled],
        "label": [label for _, label in shuffled],
    }
