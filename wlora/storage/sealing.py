"""JSON files that carry a checksum of their own content, so that damage is detected when they are read."""

from __future__ import annotations

import json
from typing import Any

from wlora.reading import read_json
from wlora.storage.content_hash import hash_bytes


def seal(content: dict[str, Any], *, indent: int | None = 1) -> str:
    """Return the text of a JSON file that carries a checksum of its content; ValueError for a number that is not finite."""
    return json.dumps({**content, "checksum": _digest(content)}, indent=indent, allow_nan=False) + "\n"


def unseal(text: str | bytes) -> dict[str, Any]:
    """Return the content of a JSON file without its checksum. A checksum, if present, is verified.

    Raises:
        ValueError: the file is damaged; the message says how.
    """
    if not text.strip():
        raise ValueError("it is empty")
    try:
        content = read_json(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError("it is not complete JSON") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    told = content.pop("checksum", None)
    if told is not None and told != _digest(content):
        raise ValueError("its content does not match its checksum")
    return content


def _digest(content: dict[str, Any]) -> str:
    """Hash the content of a JSON file, independently of its formatting."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hash_bytes(text.encode())
