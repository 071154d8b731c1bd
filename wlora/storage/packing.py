"""A compact form of records: a few JSON texts, parsed on demand. Thousands of them fit in memory and in an index.

The *frame* contains the parts that runs of a study share; it is stored and parsed once. Long lists are parsed on each
access. The remaining fields belong to the single record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, overload

from wlora.storage.records import Record

# Keys of the configuration that differ between the runs of a setting.
_OWN = ("lr", "warmup", "head_lr", "seed")
# Record fields that are entirely part of the frame, and the long lists.
_FRAMED = ("task", "model")
_LONG = ("adapters", "events", "evaluations")


class Packed(NamedTuple):
    """A record as JSON texts.

    Attributes:
        frame: configuration and environment without run-specific keys, and the fields `task` and `model`.
        own: the other fields, and the run-specific keys of the configuration.
        long: the long lists, and the command-line arguments.
    """

    frame: bytes
    own: bytes
    long: tuple[bytes, ...]


class Later(Sequence[Any]):
    """A list stored as JSON text. It is parsed on each access and not cached, to save memory."""

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
    """Convert a record to its compact form.

    Raises:
        TypeError, AttributeError: configuration or environment is not a mapping.
    """
    content = {field.name: getattr(record, field.name) for field in fields(record)}
    config, environment = dict(content["config"]), dict(content.pop("environment"))
    content["config"] = {key: config[key] for key in _OWN if key in config}
    # The frame keeps placeholders for these keys, so that the order of keys is the same after unpacking.
    config |= dict.fromkeys(content["config"])
    words = environment.get("overrides")
    environment |= {"overrides": None} if "overrides" in environment else {}
    frame = {"config": config, "environment": environment, **{name: content.pop(name) for name in _FRAMED}}
    long = [*(content.pop(name) for name in _LONG), words]
    return Packed(_text(frame), _text(content), tuple(map(_text, long)))


def _text(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


class Unpacker:
    """Converts compact forms back to records. Records with the same frame share its parts, which must not be modified."""

    def __init__(self) -> None:
        self._frames: dict[bytes, dict[str, Any]] = {}
        self._long: dict[bytes, Later] = {}

    def __call__(self, packed: Packed) -> Record:
        """Return the record.

        Raises:
            ValueError, TypeError, KeyError, RecursionError: the texts are not a valid compact record.
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
