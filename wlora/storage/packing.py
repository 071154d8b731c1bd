"""A record as a few texts, of which only what is asked for is parsed: thousands fit in memory, and in an index.

The frame is what runs of a study share; its text is kept, and parsed, once. The long lists are parsed whenever somebody
looks into them. The rest is the record's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, overload

from wlora.storage.records import Record

# Of a configuration, what differs between the runs of a setting.
_OWN = ("lr", "warmup", "head_lr", "seed")
# The sections that the frame holds whole, and the long lists.
_FRAMED = ("task", "model")
_LONG = ("adapters", "events", "evaluations")


class Packed(NamedTuple):
    """A record as JSON texts.

    Attributes:
        frame: configuration and environment without what is the run's own, and the sections on data and model.
        own: the other fields, with what the frame lacks.
        long: the long lists, and the words of the command line.
    """

    frame: bytes
    own: bytes
    long: tuple[bytes, ...]


class Later(Sequence[Any]):
    """A list that is parsed anew whenever it is looked into, and never kept."""

    def __init__(self, text: bytes) -> None:
        self._text = text

    def _parse(self) -> Any:
        return json.loads(self._text)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._parse()[index]

    def __len__(self) -> int:
        return len(self._parse())

    def __iter__(self) -> Iterator[Any]:
        yield from self._parse()

    def __reversed__(self) -> Iterator[Any]:
        yield from reversed(self._parse())

    def __eq__(self, other: object) -> bool:
        return bool(self._parse() == (other._parse() if isinstance(other, Later) else other))

    def __repr__(self) -> str:
        return repr(self._parse())


def pack(record: Record) -> Packed:
    """Return a record's texts.

    Raises:
        TypeError, AttributeError: its configuration or environment is no mapping.
    """
    content = {field.name: getattr(record, field.name) for field in fields(record)}
    config, environment = dict(content["config"]), dict(content.pop("environment"))
    content["config"] = {key: config[key] for key in _OWN if key in config}
    # In the frame these keys keep their places, so that a record has one order of keys whichever way it was read.
    config |= dict.fromkeys(content["config"])
    words = environment.get("overrides")
    environment |= {"overrides": None} if "overrides" in environment else {}
    frame = {"config": config, "environment": environment, **{name: content.pop(name) for name in _FRAMED}}
    long = [*(content.pop(name) for name in _LONG), words]
    return Packed(_text(frame), _text(content), tuple(map(_text, long)))


def _text(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


class Unpacker:
    """Makes records of texts; those of one frame share its sections, which nobody changes."""

    def __init__(self) -> None:
        self._frames: dict[bytes, dict[str, Any]] = {}
        self._long: dict[bytes, Later] = {}

    def __call__(self, packed: Packed) -> Record:
        """Return the record.

        Raises:
            ValueError, TypeError, KeyError, RecursionError: the texts are not those of one.
        """
        frame = self._frames.get(packed.frame)
        if frame is None:
            frame = self._frames[packed.frame] = json.loads(packed.frame)
        content: dict[str, Any] = json.loads(packed.own)
        *long, words = (self._long.setdefault(text, Later(text)) for text in packed.long)
        content["config"] = {**frame["config"], **content["config"]}
        content["environment"] = {**frame["environment"]}
        if "overrides" in content["environment"]:
            content["environment"]["overrides"] = words
        content |= {**dict(zip(_LONG, long, strict=True)), **{name: frame[name] for name in _FRAMED}}
        return Record(**content)
