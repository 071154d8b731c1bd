"""Records without training, for the tests of everything that reads them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import compose
from wlora.storage.records import Record, RecordStore

TOTAL = 1_000_000


@functools.lru_cache(maxsize=256)
def _config(words: tuple[str, ...]) -> str:
    return json.dumps(dataclasses.asdict(compose(*words)))


def make_record(
    results: Path,
    *words: str,
    metrics: dict[str, float] | float = 0.5,
    status: str = "success",
    precision: str = "fp32",
    data: str = "d",
    numerics: int | None = None,
    name: str | None = None,
    **fields: Any,
) -> Record:
    """Write the record of one run: its configuration is the real one, composed from `words`; its result is given."""
    config = json.loads(_config(("model=minilm", "task.path=data", *words)))
    primary = config["task"]["primary_metric"]
    if not isinstance(metrics, dict):
        metrics = dict.fromkeys(config["task"]["metrics"], metrics)
    record = Record(
        run_id=name or hashlib.sha256(repr((words, precision, data, numerics)).encode()).hexdigest()[:16],
        status=status,
        config=config,
        task={"name": config["task"]["name"], "data": data, "train_rows": 100},
        model={"name": config["model"]["name"], "fingerprint": "m"},
        metrics=metrics if status == "success" else {},
        primary_metric=primary,
        parameters={"adapter_initial": 2000, "adapter_final": 1000, "base": 0, "head": 10, "total": TOTAL},
        steps={"total": 50, "per_epoch": 10, "warmup": 5},
        seconds={"train": 8.0, "eval": 1.0, "total": 10.0},
        environment=({} if numerics is None else {"numerics": numerics})
        | {"precision": precision, "wlora": "0.1.0", "git_commit": "abc1234", "git_dirty": False},
    )
    for key, value in fields.items():
        setattr(record, key, value)
    RecordStore(results).write(record)
    return record


def watch_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that every record read from now on adds its run_id to."""
    read: list[str] = []
    load = RecordStore.load

    def noted(store: RecordStore, run_id: str) -> Record | None:
        read.append(run_id)
        return load(store, run_id)

    monkeypatch.setattr(RecordStore, "load", noted)
    return read
