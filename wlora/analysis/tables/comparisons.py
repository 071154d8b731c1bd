"""Pairwise comparisons of the methods of a table, over all its tasks and seeds."""

from __future__ import annotations

from dataclasses import dataclass

from wlora.analysis.statistics import Comparison, compare, generator
from wlora.analysis.tables.cells import Table
from wlora.analysis.tables.layouts import Row

# Compared methods as (a, b, whether K must be equal). The question is whether a improves on b.
QUESTIONS = (("wlora", "rlora", True), ("wlora", "lora", False), ("wlora_plus", "lora", False))


@dataclass(frozen=True)
class Answer:
    """A comparison of two rows of equal rank."""

    a: Row
    b: Row
    comparison: Comparison


def compare_rows(table: Table, *, bootstrap_seed: int = 0) -> list[Answer]:
    """Compare WLoRA with RLoRA at the same K, and WLoRA and WLoRA+ with LoRA, wherever both have runs."""
    answers = []
    for first, second, same_k in QUESTIONS:
        for a in (row for row in table.rows if row.method == first):
            for b in (row for row in table.rows if row.method == second and row.rank == a.rank):
                if same_k and a.k != b.k:
                    continue
                rng = generator(bootstrap_seed, f"{table.layout.name} {a} {b}")
                found = compare(_scores(table, a), _scores(table, b), rng)
                if found is not None:
                    answers.append(Answer(a, b, found))
    return answers


def _scores(table: Table, row: Row) -> dict[str, dict[int, float]]:
    return {column.task: dict(table.cells[row, column.task].scores) for column in table.layout.columns}
