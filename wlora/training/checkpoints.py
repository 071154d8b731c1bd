"""Checkpoints on disk: a folder per saved step, written whole or not at all, believed only if its checksums hold.

    <results_dir>/checkpoints/<run_id>/step-00000120/   tensors.safetensors  facts.json  manifest.json

There is no pickle anywhere: tensors in safetensors, all else in JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from wlora.errors import RunFault
from wlora.staging import remove_path, staged
from wlora.training.state import State

SCHEMA = 1
_TENSORS, _FACTS, _MANIFEST = "tensors.safetensors", "facts.json", "manifest.json"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        results_dir: the study's folder.
        run_id: the run; a checkpoint of another one is never taken for its own.
        keep: how many of the newest stay.
    """

    def __init__(self, results_dir: str | Path, run_id: str, *, keep: int) -> None:
        self.folder = Path(results_dir) / "checkpoints" / run_id
        self.run_id, self.keep = run_id, keep

    def write(self, state: State) -> Path:
        """Write a state and remove what is older than the newest `keep`.

        Raises:
            RunFault: the disk is full or the folder cannot be written; older checkpoints stay.
        """
        target = self.folder / f"step-{state.facts['step']:08d}"
        contents = {
            _TENSORS: save({name: tensor.cpu().contiguous() for name, tensor in state.tensors.items()}),
            _FACTS: json.dumps(state.facts).encode(),
        }
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        contents[_MANIFEST] = json.dumps({"schema": SCHEMA, "run_id": self.run_id, "sha256": sums}, indent=1).encode()
        try:
            with staged(target) as staging:
                staging.mkdir()
                for name, content in contents.items():
                    _write_through(staging / name, content)
                _sync(staging)
                remove_path(target)  # an earlier one of the same step, which may be broken
                os.replace(staging, target)
                _sync(self.folder)
        except OSError as error:
            raise RunFault(f"the checkpoint {target} cannot be written ({error.strerror}); older ones stay") from error
        for old in self._folders()[self.keep :]:
            remove_path(old)
        return target

    def read(self) -> Iterator[tuple[Path, State | str]]:
        """Yield the checkpoints, newest first: each as its state, or as what is wrong with it."""
        for folder in self._folders():
            try:
                yield folder, self._read(folder)
            except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
                yield folder, " ".join(f"{type(error).__name__}: {error}".split())

    def discard(self, folder: Path) -> None:
        """Remove one checkpoint, such as a broken one, that would else stand in the way as the newest."""
        remove_path(folder)

    def remove(self) -> None:
        """Remove all checkpoints of the run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # if it was the last run's

    def _read(self, folder: Path) -> State:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        if (manifest["schema"], manifest["run_id"]) != (SCHEMA, self.run_id):
            raise ValueError(f"schema {manifest['schema']} of run {manifest['run_id']}")
        contents = {name: (folder / name).read_bytes() for name in (_TENSORS, _FACTS)}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != manifest["sha256"][name]:
                raise ValueError(f"{name} is not what was written")
        return State(json.loads(contents[_FACTS]), load(contents[_TENSORS]))

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


def _write_through(path: Path, content: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Make a folder's entries durable; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
