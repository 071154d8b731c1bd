"""`story_nli`: does a hypothesis about a small world follow from a story, contradict it, or neither?

Rows are generated in groups of three: one hypothesis with three stories, one for each label. The three stories have the same
number of events, and all mention the person and the place of the hypothesis. Therefore the hypothesis, the number of
sentences and the repeated names give no information about the label. The words of the premise alone allow an accuracy of
about 0.65, because a story in which nobody moves is neutral. A higher accuracy requires knowing who did what and when.
"""

from __future__ import annotations

import random
from typing import Any

from wlora.data.synthetic.world import PEOPLE, PLACES, Claim, pick, random_world, render

# Small enough for a demo: a 6-layer encoder learns to follow two events in about a minute on a CPU.
NLI_TRIPLES = {"train": 600, "validation": 120}
NLI_EVENTS = 2
NLI_KINDS = ("go", "go", "go", "take", "give", "mention", "mention")


def nli_columns(split: str, rng: random.Random) -> dict[str, list[Any]]:
    """Return the columns of one split: premise, hypothesis, label. No pair occurs twice."""
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
