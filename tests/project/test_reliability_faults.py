"""The shim of `scripts/reliability.py faults`: which calls it counts, and that it answers one of them with a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.integration

PROGRAM = """
import errno, json, os, sys
from pathlib import Path
from reliability_faults import Shim
from wlora.storage.atomic_write import write_whole

folder, at = Path(sys.argv[1]), json.loads(sys.argv[2])
met = []
shim = Shim({"results": folder}, at, errno.EIO, met.append)
shim.install()
told = None
try:
    write_whole(folder / "records" / "a.json", b"content")
    (folder / "records" / "a.json").read_bytes()
    Path("/proc/self/stat").read_bytes()
except OSError as error:
    told = error.errno
sys.stdout.write(json.dumps([[call for call, _ in shim.calls], met, told]))
"""


def work(folder: Path, at: int | None) -> tuple[list[str], list[str], int | None]:
    """Write and read a file under the shim; returns the calls, those that failed, and the error that came out."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "scripts")))
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(at)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True, timeout=300
    )
    calls, met, told = json.loads(done.stdout)
    return calls, met, told


def test_every_call_on_a_watched_file_is_counted_and_one_of_them_fails(tmp_path: Path) -> None:
    calls, met, told = work(tmp_path / "whole", None)
    assert met == [] and told is None
    kinds = ("mkdir results", "open results/records/json", "write results/records/json", "fsync results/records/json")
    assert {*kinds, "replace results/records/json", "read results/records/json"} <= set(calls)
    at = calls.index("write results/records/json")
    _, met, told = work(tmp_path / "failing", at)
    assert met == ["write results/records/json"] and told == 5
    assert list((tmp_path / "failing" / "records").iterdir()) == [], "no half file is left"
