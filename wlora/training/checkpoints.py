"""Checkpoints on disk: one folder per saved step, written atomically and accepted only if its checksums match.

    <results_dir>/checkpoints/<run_id>/step-00000120/   tensors.safetensors  facts.json  manifest.json

While a process holds the claim of a run, its checkpoints are in that process's own subfolder (`wlora.storage.claims`).
Pickle is not used: tensors are stored as safetensors, everything else as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from wlora.errors import RunFault
from wlora.reading import read_file, read_json
from wlora.storage.atomic_write import MISSING, patiently, put, remove_path, staged
from wlora.storage.claims import Claim
from wlora.storage.sealing import seal, unseal
from wlora.training.state import State

SCHEMA = 1
_TENSORS, _FACTS, _MANIFEST = "tensors.safetensors", "facts.json", "manifest.json"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        results_dir: the study's folder.
        run_id: the run; a checkpoint of another run is never used.
        keep: number of newest checkpoints to keep.
        claim: the right to write the run's files, if other processes may execute the same run.
    """

    def __init__(self, results_dir: str | Path, run_id: str, *, keep: int, claim: Claim | None = None) -> None:
        self._base = Path(results_dir) / "checkpoints" / run_id
        self.folder = claim.folder if claim else self._base
        self.run_id, self.keep = run_id, keep
        self._put = claim.put if claim else put

    def write(self, state: State) -> Path:
        """Write a state and remove all checkpoints except the newest `keep`.

        Raises:
            RunFault: the disk is full, the folder cannot be written, or another process has taken over the run. Older
                checkpoints are kept.
        """
        target = self.folder / f"step-{state.facts['step']:08d}"
        contents = {
            _TENSORS: save({name: tensor.cpu().contiguous() for name, tensor in state.tensors.items()}),
            _FACTS: json.dumps(state.facts).encode(),
        }
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        contents[_MANIFEST] = seal({"schema": SCHEMA, "run_id": self.run_id, "sha256": sums}).encode()
        try:
            with staged(self._base / target.name) as staging:
                staging.mkdir()
                for name, content in contents.items():
                    with open(staging / name, "xb") as stream:
                        stream.write(content)
                self._put(staging, target)  # replaces an earlier checkpoint of this step, which may be damaged
            older = self._folders()[self.keep :]
        except OSError as error:
            raise RunFault(
                f"the checkpoint {self.place(target)} cannot be written ({error.strerror}); older checkpoints are kept"
            ) from error
        for old in older:
            remove_path(old)
        return target

    def read(self) -> Iterator[tuple[Path, State | str]]:
        """Yield the checkpoints, newest first: each as its state, or as a description of the damage.

        Raises:
            RunFault: a checkpoint cannot be read, or belongs to other code or another run. It may be intact, so nothing
                is removed.
        """
        place = self.folder
        try:
            for place in self._folders():
                try:
                    yield place, self._read(place)
                except (*MISSING, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
                    yield place, " ".join(f"{type(error).__name__}: {error}".split())
        except OSError as error:
            raise RunFault(
                f"checkpoint {self.place(place)} cannot be read ({error.strerror}); nothing was removed\n"
                "way out: repeat the command when the file can be read again; force=true starts again from step 0"
            ) from error

    def place(self, folder: Path) -> Path:
        """Return a checkpoint's path while no process holds the run, for messages."""
        return self._base / folder.name

    def present(self) -> bool:
        """Return whether any process that held the run has left a checkpoint, intact or not."""
        with contextlib.suppress(OSError):
            return any(True for pattern in ("step-*", "*/step-*") for _ in self._base.glob(pattern))
        return False

    def discard(self, folder: Path) -> None:
        """Remove one checkpoint, such as a damaged one, which would otherwise count as the newest."""
        remove_path(folder)

    def remove(self) -> None:
        """Remove all checkpoints of the run."""
        remove_path(self.folder)
        with contextlib.suppress(OSError):  # removes empty folders only
            if self.folder != self._base:
                self._base.rmdir()
            self._base.parent.rmdir()

    def _read(self, folder: Path) -> State:
        manifest = unseal(patiently(lambda: read_file(folder / _MANIFEST)))
        if (manifest["schema"], manifest["run_id"]) != (SCHEMA, self.run_id):
            raise RunFault(
                f"checkpoint {self.place(folder)} has schema {manifest['schema']} and is of run {manifest['run_id']}, not "
                f"{SCHEMA} and {self.run_id}; nothing was removed\n"
                "way out: use the code that wrote it; force=true starts again from step 0"
            )
        contents = {name: patiently(partial(read_file, folder / name)) for name in (_TENSORS, _FACTS)}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != manifest["sha256"][name]:
                raise ValueError(f"the checksum of {name} does not match")
        return State(read_json(contents[_FACTS]), load(contents[_TENSORS]))

    def _folders(self) -> list[Path]:
        """List the checkpoints, newest first.

        Raises:
            OSError: listing fails. An empty list would make the run start again from step 0.
        """
        try:
            names = patiently(lambda: os.listdir(self.folder))
        except FileNotFoundError:
            return []
        return [self.folder / name for name in sorted(names, reverse=True) if name.startswith("step-")]
