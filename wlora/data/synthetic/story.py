"""The synthetic reading tasks by name: deterministic, offline, short."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from wlora.data.synthetic.nli import nli_columns
from wlora.data.synthetic.qa import QUESTION_TEMPLATES, qa_columns
from wlora.data.synthetic.summary import SUMMARY, summary_columns
from wlora.data.synthetic.world import CLAIM_TEMPLATES, EVENT_TEMPLATES, PEOPLE, PLACES, SPLITS, THINGS
from wlora.errors import unknown_name

GENERATOR_VERSION = 1
"""Increase this number with every change of the generated texts. It is part of a run's identity."""

_GENERATORS: dict[str, Callable[[str, random.Random], dict[str, list[Any]]]] = {
    "story_nli": nli_columns,
    "story_qa": qa_columns,
    "story_summary": summary_columns,
}


def generate(name: str, split: str) -> dict[str, list[Any]]:
    """Return the columns of one split of a task: those named in its YAML file, and the labels or answers.

    Raises:
        ConfigError: an unknown name or split.
    """
    if name not in _GENERATORS:
        raise unknown_name("generator", name, _GENERATORS)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    return _GENERATORS[name](split, random.Random(f"{name} {split} {GENERATOR_VERSION}"))


def vocabulary() -> list[str]:
    """Return every lower-case word and punctuation mark that a generated text can contain, sorted."""
    kinds = [*EVENT_TEMPLATES.values(), CLAIM_TEMPLATES, *QUESTION_TEMPLATES.values(), (SUMMARY,)]
    templates = [text for texts in kinds for text in texts]
    texts = [re.sub(r"\{\w+\}", "", text) for text in templates]
    words = re.findall(r"\w+|[^\w\s]", " ".join([*texts, *PEOPLE, *PLACES, *THINGS]).lower())
    return sorted(set(words))


def sample_texts() -> Iterator[str]:
    """Yield all training texts, as a corpus for a tokenizer."""
    for name in _GENERATORS:
        for column, values in generate(name, "train").items():
            yield from (value for value in values if isinstance(value, str) and column not in ("id", "title"))
