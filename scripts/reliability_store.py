"""Many processes write the records of one folder, and some are killed: the part `store` of `scripts/reliability.py`."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from wlora.storage.claims import Claim
from wlora.storage.locks import RunLock
from wlora.storage.records import Record, RecordStore

ENTRY = Path(__file__).with_name("reliability.py")
WORKERS, RECORDS_EACH, KILLS = 8, 100, 40


def store(seed: int) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """Let several processes complete the same records in one folder. Meanwhile, kill and replace processes."""
    moments, kills, total = random.Random(seed), 0, WORKERS * RECORDS_EACH
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers = [start_worker(folder, index) for index in range(WORKERS)]
        while any(worker.poll() is None for worker in workers):
            time.sleep(moments.uniform(0.05, 0.3))
            index = moments.randrange(WORKERS)
            if kills < KILLS and workers[index].poll() is None:
                workers[index].kill()
                workers[index].wait()
                kills += 1
                workers[index] = start_worker(folder, index)
        completed = Counter((folder / "completed").read_text().split())
        readable = [record.run_id for record in RecordStore(folder) if record.status == "success"]
        files = [path.stem for path in (folder / "records").glob("*.json")]
        left = [path.name for path in (folder / "records").iterdir() if path.suffix != ".json"]
    summary = {
        "processes": WORKERS,
        "kills": kills,
        "records": len(readable),
        "torn": len(files) - len(readable),
        "completed_twice": sum(count > 1 for count in completed.values()),
        "half_written_files_left": len(left),
    }
    rows = [{"record": name, "completed": completed[name]} for name in sorted(files)]
    return rows, summary, (len(readable), summary["torn"], summary["completed_twice"]) == (total, 0, 0) and kills > 0


def start_worker(folder: Path, index: int) -> subprocess.Popen[bytes]:
    """Start one of the processes that complete records."""
    command = [sys.executable, str(ENTRY), "work", "--folder", str(folder), "--seed", str(index)]
    return subprocess.Popen(command)


def work(folder: Path, seed: int) -> None:
    """Complete every record that is incomplete and not locked by another process, until all are complete."""
    names = [f"{number:016x}" for number in range(WORKERS * RECORDS_EACH)]
    random.Random(seed).shuffle(names)
    records = RecordStore(folder)
    while names:
        for name in list(names):
            lock = RunLock(folder, name)
            if not lock.acquire():
                continue
            claim = Claim(folder, lock, lock.token or "")
            with lock.held(), claim.opened():
                own, done = RecordStore(folder, claim.put), records.read(name)
                if done is None or done.status != "success":
                    own.write(Record(run_id=name, status="running", config={"padding": "x" * 20_000}))
                    own.write(Record(run_id=name, status="success", config={"padding": "x" * 20_000}))
                    with open(folder / "completed", "a") as stream:
                        stream.write(name + "\n")
            names.remove(name)
