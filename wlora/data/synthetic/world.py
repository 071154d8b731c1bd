"""Small worlds for the synthetic tasks: their events, and the sentences that describe them.

`World` applies `Event`s and tracks where people are and what they hold. `render` converts events and claims to sentences,
using only sentences of the given split. The tasks (`nli`, `qa`, `summary`) build their rows from both.

**Splits.** A *combination* is a template with the entities that fill it, that is, one sentence. `split_of` assigns each
combination to exactly one split. Therefore train and validation share all words but no sentence, in premises and hypotheses.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

SPLITS = ("train", "validation")
ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)

PEOPLE = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Julia",
    "Kevin",
    "Laura",
    "Peter",
)
# No place may contain another, as a hotel contains a kitchen, because being in one place must exclude all others.
PLACES = ("bakery", "bank", "church", "hospital", "library", "museum", "school", "theater")
THINGS = ("ball", "book", "camera", "guitar", "hammer", "lamp", "ring", "ticket")

EVENT_TEMPLATES = {
    "go": (
        "{person} went to the {item}.",
        "{person} walked into the {item}.",
        "{person} entered the {item}.",
        "{person} arrived at the {item}.",
    ),
    "take": (
        "{person} took the {item}.",
        "{person} picked up the {item}.",
        "{person} grabbed the {item}.",
        "{person} found the {item}.",
    ),
    "give": (
        "{person} gave the {item} to {other}.",
        "{person} handed the {item} to {other}.",
        "{other} got the {item} from {person}.",
        "{other} received the {item} from {person}.",
    ),
    "mention": (
        "{person} talked about the {item}.",
        "{person} asked about the {item}.",
        "{person} read about the {item}.",
        "{person} thought about the {item}.",
    ),
}
CLAIM_TEMPLATES = (
    "{person} is in the {item}.",
    "{person} is inside the {item}.",
    "{person} is now at the {item}.",
    "You can find {person} in the {item}.",
)

SPLIT_MODULUS = 4
"""Must not exceed the number of templates of a kind, so that every event and claim has a sentence in both splits."""


@dataclass(frozen=True)
class Event:
    """An event: `person` goes to, takes, gives (to `other`) or mentions `item`."""

    kind: str
    person: str
    item: str
    other: str = ""


@dataclass(frozen=True)
class Claim:
    """The claim that `person` is in `place`. It may be true, false or unknown."""

    person: str
    place: str


@dataclass
class World:
    """The known places of people and holders of things after `history`. Missing entries are unknown."""

    place_of: dict[str, str] = field(default_factory=dict)
    holder_of: dict[str, str] = field(default_factory=dict)
    history: list[Event] = field(default_factory=list)

    def allows(self, event: Event) -> bool:
        """Tell whether `event` is possible now and changes the world."""
        if event in self.history:
            return False
        if event.kind == "go":
            return self.place_of.get(event.person) != event.item
        if event.kind == "take":
            return event.item not in self.holder_of
        if event.kind == "give":
            # Giver and receiver are in one place. If one of the two places were unknown, giving would reveal it.
            together = self.place_of.get(event.person) == self.place_of.get(event.other)
            return together and self.holder_of.get(event.item, event.person) == event.person
        return True

    def apply(self, event: Event) -> None:
        """Apply `event` to the world."""
        if event.kind == "go":
            self.place_of[event.person] = event.item
        elif event.kind == "take":
            self.holder_of[event.item] = event.person
        elif event.kind == "give":
            self.holder_of[event.item] = event.other
        self.history.append(event)

    def mentions(self, name: str) -> bool:
        """Tell whether any event involves the person, place or thing `name`."""
        return any(name in (event.person, event.item, event.other) for event in self.history)

    def judge(self, claim: Claim) -> int:
        """Return the label of `claim`: it follows from the history, is undetermined, or contradicts the history."""
        place = self.place_of.get(claim.person)
        if place is None:
            return NEUTRAL
        return ENTAILMENT if place == claim.place else CONTRADICTION


def split_of(template: int, *entities: str) -> str:
    """Return the one split in which the template at this position may be filled with these entities."""
    tables = (PEOPLE, PLACES, THINGS)
    total = template + sum(table.index(entity) for entity in entities for table in tables if entity in table)
    return "train" if total % SPLIT_MODULUS else "validation"


def render(part: Event | Claim, split: str, rng: random.Random) -> str:
    """Express `part` by a random sentence of `split`."""
    if isinstance(part, Event):
        templates, person, item, other = EVENT_TEMPLATES[part.kind], part.person, part.item, part.other
    else:
        templates, person, item, other = CLAIM_TEMPLATES, part.person, part.place, ""
    allowed = [text for i, text in enumerate(templates) if split_of(i, person, item, other) == split]
    return pick(rng, allowed).format(person=person, item=item, other=other)


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Return a random option."""
    # Only Random.random() guarantees the same sequence in every Python version.
    return options[int(rng.random() * len(options))]


def pick_two(rng: random.Random, options: Sequence[str], first: str = "") -> tuple[str, str]:
    """Return two different options, the first of them given or random."""
    first = first or pick(rng, options)
    return first, pick(rng, [option for option in options if option != first])


def random_world(
    rng: random.Random, events: int, kinds: Sequence[str], *, person: str = "", place: str = "", thing: str = ""
) -> World:
    """Generate a world by random events of the given kinds with two people, places and things; one of each may be given."""
    people, places, things = pick_two(rng, PEOPLE, person), pick_two(rng, PLACES, place), pick_two(rng, THINGS, thing)
    items = {"go": places, "take": things, "give": things, "mention": places + things}
    world = World()
    while len(world.history) < events:
        kind = pick(rng, kinds)
        actor, other = pick_two(rng, people)
        event = Event(kind, actor, pick(rng, items[kind]), other if kind == "give" else "")
        if world.allows(event):
            world.apply(event)
    return world
