"""Synthetic reading tasks over small worlds: deterministic, offline, short.

Three layers, so that another task of the family only adds to the last one:

1. `World` replays `Event`s and knows who is where and who holds what.
2. `render` turns events and claims into sentences, using only those that belong to the wanted split.
3. `generate` builds the rows of one named task: `story_nli` here, others in modules of their own.

**Splits.** A *combination* is a template with the entities that fill it: one sentence. `split_of` gives each
to exactly one split, so train and validation share every word but no sentence, in premises or in hypotheses.

**Shortcuts in `story_nli`.** Rows come in threes: one hypothesis under three stories, one for each label, all
with equally many events and all mentioning the person and the place in question. So the hypothesis, the
number of sentences and whether its names return tell nothing. The premise's words alone remain a hint (where
nobody goes anywhere, all is open) worth about 0.65 accuracy; the rest takes knowing who did what, and when.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from wlora.errors import unknown_name

T = TypeVar("T")

GENERATOR_VERSION = 1
"""To be raised with every change of the generated text: it is part of a run's identity."""

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
# None of these is found inside another (as a kitchen is in a hotel): being in one excludes the others.
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
"""At most the number of templates of a kind: then every event and claim has a sentence in both splits."""

# Sized for a demo: two events are what a 6-layer encoder learns to follow in a minute or so on a CPU.
NLI_TRIPLES = {"train": 600, "validation": 120}
NLI_EVENTS = 2
NLI_KINDS = ("go", "go", "go", "take", "give", "mention", "mention")


@dataclass(frozen=True)
class Event:
    """Something that happens: `person` goes to, takes, gives (to `other`) or mentions `item`."""

    kind: str
    person: str
    item: str
    other: str = ""


@dataclass(frozen=True)
class Claim:
    """That `person` is in `place`, which may be true, false or unknown."""

    person: str
    place: str


@dataclass
class World:
    """Who is where and who holds what after `history`; what is in neither table is unknown."""

    place_of: dict[str, str] = field(default_factory=dict)
    holder_of: dict[str, str] = field(default_factory=dict)
    history: list[Event] = field(default_factory=list)

    def allows(self, event: Event) -> bool:
        """Tell whether `event` can happen now and is news."""
        if event in self.history:
            return False
        if event.kind == "go":
            return self.place_of.get(event.person) != event.item
        if event.kind == "take":
            return event.item not in self.holder_of
        if event.kind == "give":
            # Giving happens in one place: were one of the two places unknown, the story would reveal it.
            together = self.place_of.get(event.person) == self.place_of.get(event.other)
            return together and self.holder_of.get(event.item, event.person) == event.person
        return True

    def apply(self, event: Event) -> None:
        """Let `event` happen."""
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
        """Label `claim`: it follows from the history, is left open by it, or contradicts it."""
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
    """Say `part` in a random sentence among those of `split`."""
    if isinstance(part, Event):
        templates, person, item, other = EVENT_TEMPLATES[part.kind], part.person, part.item, part.other
    else:
        templates, person, item, other = CLAIM_TEMPLATES, part.person, part.place, ""
    allowed = [text for i, text in enumerate(templates) if split_of(i, person, item, other) == split]
    return pick(rng, allowed).format(person=person, item=item, other=other)


def generate(name: str, split: str) -> dict[str, list[Any]]:
    """Return the columns of one split of a task, those that its YAML names and its labels or answers.

    Raises:
        ConfigError: an unknown name or split.
    """
    generators = _generators()
    if name not in generators:
        raise unknown_name("generator", name, generators)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    return generators[name](split, random.Random(f"{name} {split} {GENERATOR_VERSION}"))


def vocabulary() -> list[str]:
    """Return every lower-case word and punctuation mark that a generated text can contain, sorted."""
    from wlora.data.synthetic.qa import QUESTION_TEMPLATES
    from wlora.data.synthetic.summary import SUMMARY

    kinds = [*EVENT_TEMPLATES.values(), CLAIM_TEMPLATES, *QUESTION_TEMPLATES.values(), (SUMMARY,)]
    templates = [text for texts in kinds for text in texts]
    texts = [re.sub(r"\{\w+\}", "", text) for text in templates]
    words = re.findall(r"\w+|[^\w\s]", " ".join([*texts, *PEOPLE, *PLACES, *THINGS]).lower())
    return sorted(set(words))


def sample_texts() -> Iterator[str]:
    """Yield all training texts, as a corpus for a tokenizer."""
    for name in _generators():
        for column, values in generate(name, "train").items():
            yield from (value for value in values if isinstance(value, str) and column not in ("id", "title"))


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Return a random option."""
    # Of all of Random, only random() is promised to give the same sequence in every Python version.
    return options[int(rng.random() * len(options))]


def pick_two(rng: random.Random, options: Sequence[str], first: str = "") -> tuple[str, str]:
    """Return two different options, the first of them given or random."""
    first = first or pick(rng, options)
    return first, pick(rng, [option for option in options if option != first])


def random_world(
    rng: random.Random, events: int, kinds: Sequence[str], *, person: str = "", place: str = "", thing: str = ""
) -> World:
    """Let random events of these kinds happen among two people, places and things, of which one each may be given."""
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


def _nli_columns(split: str, rng: random.Random) -> dict[str, list[Any]]:
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


def _generators() -> dict[str, Callable[[str, random.Random], dict[str, list[Any]]]]:
    # Imported late: the modules of the other tasks build on this one.
    from wlora.data.synthetic.qa import qa_columns
    from wlora.data.synthetic.summary import summary_columns

    return {"story_nli": _nli_columns, "story_qa": qa_columns, "story_summary": summary_columns}
