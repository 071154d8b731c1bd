"""What the files of a study said when they were last read, so that thousands of them are not parsed at every command.

A cache: `<results_dir>/records/.index` for records, `.curves` for learning curves. It may be deleted at any time, and a
folder that cannot be written has none. An entry is valid only for the file that it was made from, known by its size, time
of change and inode; all other files are read. An entry is one line with a checksum, so that damage costs an entry and not
the index. Writers replace the whole file: of several at once the last one stays, and nothing is lost but time.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from wlora.storage.atomic_write import remove_path, write_whole
from wlora.storage.content_hash import hash_bytes
from wlora.storage.records import RecordStore

# Changes with the meaning of what is written.
_HEADER = b"wlora index 2\n"
# Reading so many files takes a twentieth of a second: a smaller study has no index, and a new record leaves it as it is.
UNINDEXED = 200
# A file that changed so shortly before it was looked at may change again within one tick of its file system's clock.
RACY_NS = 2_000_000_000


class Entry(NamedTuple):
    """What one file said, as JSON texts.

    Attributes:
        name: the run_id.
        frame: a text that many entries share; it is written once.
        columns: the others.
    """

    name: str
    frame: bytes
    columns: tuple[bytes, ...]


class Index:
    """The entries that hold for the files of one suffix as they were when this was made.

    Args:
        store: the records of a study.
        suffix: `.json` or `.jsonl`.
    """

    def __init__(self, store: RecordStore, suffix: str) -> None:
        begin = time.time_ns()
        self._file = store.folder / {".json": ".index", ".jsonl": ".curves"}[suffix]
        stamps = store.stamps(suffix)
        self._stamps = {os.fsencode(name): b"%d %d %d" % stamp for name, stamp in stamps.items()}
        self._settled = {name for name, (_, changed, _) in stamps.items() if changed < begin - RACY_NS}
        self._new: list[Entry] = []

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over the entries, as they are on the disk."""
        frames, seen = {b"": b""}, set()
        for kind, name, stamp, frame, *columns in self._lines():
            if kind == b"frame":
                frames[name] = frame
            elif self._stamps.get(name) == stamp and frame in frames and name not in seen:
                seen.add(name)
                yield Entry(os.fsdecode(name), frames[frame], tuple(columns))

    def _lines(self) -> Iterator[list[bytes]]:
        """Yield the columns of every line whose checksum holds; none where there is no index or it cannot be read."""
        with contextlib.suppress(OSError):
            if self._file.is_file():
                with open(self._file, "rb") as stream:
                    if stream.readline() == _HEADER:
                        for line in stream:
                            told, _, rest = line[:-1].partition(b"\t")
                            columns = rest.split(b"\t")
                            if told == b"%08x" % zlib.crc32(rest) and len(columns) > 3:
                                yield columns

    def add(self, entry: Entry) -> None:
        """Enter what a file says that was read after this was made, unless it has changed a moment before."""
        if entry.name in self._settled and not {"\t", "\n"} & set(entry.name):
            self._new.append(entry)

    def write(self) -> None:
        """Write the index anew, if enough was entered to be worth it; a folder that cannot be written has none."""
        if len(self._new) < UNINDEXED:
            return
        out, told = io.BytesIO(), {b""}  # one buffer: thousands of entries are tens of megabytes
        out.write(_HEADER)
        for name, frame, columns in (*self, *self._new):
            digest = hash_bytes(frame).encode() if frame else b""
            if digest not in told:
                told.add(digest)
                out.write(_line(b"frame", digest, b"", frame))
            key = os.fsencode(name)
            out.write(_line(b"file", key, self._stamps[key], digest, *columns))
        with contextlib.suppress(OSError):
            write_whole(self._file, out.getvalue())
            self._remove_leftovers()
        self._new.clear()

    def _remove_leftovers(self) -> None:
        """Remove what killed writers have left half-written; no living one takes an hour."""
        for path in self._file.parent.glob(f".{self._file.name}.*"):
            if time.time() - path.lstat().st_mtime > 3600:
                remove_path(path)


def _line(*columns: bytes) -> bytes:
    text = b"\t".join(columns)
    return b"%08x\t%b\n" % (zlib.crc32(text), text)
