"""Records of invented runs, and the tables that are filled from them."""

from __future__ import annotations

from pathlib import Path

from tests.support.synthetic import make_record
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tables.cells import Table, fill
from wlora.analysis.tables.layouts import LAYOUTS, Row

WLORA, RLORA, LORA = Row("wlora", 8, 5), Row("rlora", 8, 5), Row("lora", 8)


def record(results: Path, method: str, task: str, seed: int, score: float, *words: str, **options: object) -> None:
    if "task_rows" in options:
        options["task"] = {"name": task, "data": "d", "train_rows": options.pop("task_rows")}
    if task == "mrpc":
        options["metrics"] = {"accuracy": score, "f1": score + 0.1, "accuracy_f1": score + 0.05}
    make_record(
        results,
        f"method={method}",
        f"task={task}",
        f"seed={seed}",
        *words,
        **{"metrics": score, **options},  # type: ignore[arg-type]
    )


def study(results: Path) -> None:
    """Two methods on two tasks: RLoRA lacks a seed on MRPC, WLoRA has one that diverged on SST-2."""
    for seed, score in enumerate((0.80, 0.82, 0.84)):
        record(results, "wlora", "sst2", seed, score, "k=5")
        record(results, "wlora", "mrpc", seed, score - 0.1, "k=5")
        record(results, "rlora", "sst2", seed, score - 0.05, "k=5")
        if seed:
            record(results, "rlora", "mrpc", seed, score - 0.2, "k=5")
    record(results, "wlora", "sst2", 3, 0.0, "k=5", status="diverged")


def filled(results: Path, name: str = "6", **options: object) -> Table:
    return fill(LAYOUTS[name], read_runs(results), model="minilm", **options)  # type: ignore[arg-type]


def lines(text: str) -> list[str]:
    return text.splitlines()
