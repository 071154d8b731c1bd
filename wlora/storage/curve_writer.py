"""Writes the learning curve of a run: one JSON object per line, appended while the run trains."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from wlora.errors import ConfigError, RunFault
from wlora.storage.atomic_write import Put, put, staged
from wlora.storage.content_hash import hash_bytes

_NO_LINK, _NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)


class CurveWriter:
    """Appends points to a learning curve, one JSON object per line.

    The writer keeps its file open, so that it never appends to a file of another process. If the file was removed or
    replaced, the writer creates it again with all points.

    Attributes:
        points: all points so far.
    """

    def __init__(self, path: Path | None, put: Put = put) -> None:
        self._path, self._put = path, put
        self._size = 0
        self._own: IO[bytes] | None = None
        self.points: list[dict[str, Any]] = []
        try:
            if path is not None:
                self._replace()
        except OSError as error:
            assert path is not None
            raise ConfigError(f"results_dir: {path.parent} cannot be written ({error.strerror})") from error

    def __call__(self, point: dict[str, Any]) -> None:
        """Append one point.

        Raises:
            RunFault: the disk is full, or another process has taken over the run.
        """
        self.points.append(point)
        self._write(_lines([point]))

    def checksum(self) -> str:
        """Return 16 hex digits of the checksum of all points so far."""
        return hash_bytes(_lines(self.points))

    def finish(self) -> str:
        """Write the whole curve to disk, even if the file was removed or changed, and return its checksum.

        Raises:
            RunFault: the disk is full.
        """
        self._write(None)
        self.close()
        return self.checksum()

    def restart(self, points: list[dict[str, Any]]) -> None:
        """Continue the curve of an interrupted run after the given points. Later points in its file are dropped."""
        self.points = list(points)
        self._write(None)

    def close(self) -> None:
        """Close the file after the last point."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def _write(self, more: bytes | None) -> None:
        """Append lines. If they are None, or if the file was changed since the last write, write all points again."""
        if self._path is None:
            return
        try:
            if more is None or not self._append(more):
                self._replace()
        except OSError as error:
            raise RunFault(f"the learning curve {self._path} cannot be written ({error.strerror})") from error

    def _replace(self) -> None:
        """Replace the file by one with all points."""
        assert self._path is not None
        content = _lines(self.points)
        self.close()
        with staged(self._path) as staging:
            staging.write_bytes(content)
            own = staging.open("rb")
            if os.name == "nt":  # Windows can neither move nor replace an open file
                own.close()
            self._put(staging, self._path)
        self._own = self._path.open("rb") if own.closed else own
        self._size = len(content)

    def _append(self, more: bytes) -> bool:
        """Append to this writer's file. Return False if it was removed or replaced by another file or a link."""
        assert self._path is not None
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | _NO_LINK | _NO_WAIT)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                raise
            return False
        with open(descriptor, "ab") as stream:
            found = os.fstat(descriptor)
            if self._own is None or not os.path.samestat(found, os.fstat(self._own.fileno())) or found.st_size != self._size:
                return False
            stream.write(more)
        self._size += len(more)
        return True


def _lines(points: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(point) + "\n" for point in points).encode()
