"""A cache of the parsed files of a study, so that commands need not parse thousands of files again.

The caches are `<results_dir>/records/.index` for records and `.curves` for learning curves. They may be deleted at any time,
and do not exist in read-only folders. An entry is valid only while its file has the same size, modification time and inode;
other files are read. An entry is one line with a checksum, so damage affects single entries. Writers replace the whole file;
if several write at once, the last one wins, and the only loss is time.
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

# Version of the format. Increase it when the meaning of entries changes.
_HEADER = b"wlora index 2\n"
# Minimum number of new entries to write the index. Reading this many files takes only 0.05 seconds, so small studies have no
# index, and single new records do not rewrite it.
UNINDEXED = 200
# Files changed within this time before the check are not cached: a second change could have the same timestamp.
RACY_NS = 2_000_000_000


class Entry(NamedTuple):
    """The content of one file as JSON texts.

    Attributes:
        name: the run_id.
        frame: a text shared by many entries and stored once.
        columns: the other texts.
    """

    name: str
    frame: bytes
    columns: tuple[bytes, ...]


class Index:
    """The entries that are valid for the files with one suffix at the time of construction.

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
        """Iterate over the valid entries on disk."""
        frames, seen = {b"": b""}, set()
        for kind, name, stamp, frame, *columns in self._lines():
            if kind == b"frame":
                frames[name] = frame
            elif self._stamps.get(name) == stamp and frame in frames and name not in seen:
                seen.add(name)
                yield Entry(os.fsdecode(name), frames[frame], tuple(columns))

    def _lines(self) -> Iterator[list[bytes]]:
        """Yield the columns of every line with a correct checksum; nothing if the index is missing or unreadable."""
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
        """Add an entry for a file read after construction of this index, unless the file was changed very recently."""
        if entry.name in self._settled and not {"\t", "\n"} & set(entry.name):
            self._new.append(entry)

    def write(self) -> None:
        """Rewrite the index if at least `UNINDEXED` entries were added. Write errors are ignored."""
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
        """Remove temporary files of killed writers: those older than an hour."""
        for path in self._file.parent.glob(f".{self._file.name}.*"):
            if time.time() - path.lstat().st_mtime > 3600:
                remove_path(path)


def _line(*columns: bytes) -> bytes:
    text = b"\t".join(columns)
    return b"%08x\t%b\n" % (zlib.crc32(text), text)
