"""What a disk can do to a file."""

from __future__ import annotations

from pathlib import Path

KINDS = ("truncated", "halved", "emptied", "flipped", "deleted")


def damage(file: Path, kind: str) -> None:
    """Damage a file in one of `KINDS`."""
    content = file.read_bytes()
    middle = len(content) // 2
    file.unlink()
    if kind != "deleted":
        flipped = flip(content, middle)
        file.write_bytes({"truncated": content[:-2], "halved": content[:middle], "emptied": b"", "flipped": flipped}[kind])


def flip(content: bytes, place: int) -> bytes:
    """Return a content with the lowest bit of one byte turned."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
