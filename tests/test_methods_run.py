"""Every method through the entry point on a tiny model: trains, records, and repeats bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wlora.config import config_folder

# NoRA's frame of rank 64 is wider than a tiny model.
OWN = {"nora": ["method.outer_rank=16"]}
METHODS = sorted(file.stem for file in (config_folder() / "method").glob("*.yaml"))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_ends_with_a_success_record_and_repeats_bit_for_bit(
    method: str, run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    settings = [f"method={method}", "rank=4", "task.max_train_rows=192", *OWN.get(method, [])]
    first, again = (run_tiny(*settings, results=tmp_path / folder) for folder in ("a", "b"))
    assert first.status == "success" and first.metrics == again.metrics and first.adapters == again.adapters
    names = [f"{first.run_id}.jsonl" for _ in range(2)]
    curves = [(tmp_path / folder / "records" / name).read_bytes() for folder, name in zip(("a", "b"), names, strict=True)]
    assert curves[0] == curves[1]
    if method not in ("full", "probe"):
        assert first.parameters["adapter_initial"] > 0 and first.adapters


def test_methods_differ_from_each_other_on_the_same_seed(run_tiny: Callable[..., Any]) -> None:
    losses = {name: run_tiny(f"method={name}", "rank=4", "lr=3e-3", *OWN.get(name, [])).metrics["loss"] for name in METHODS}
    assert len(set(losses.values())) == len(METHODS), losses
