"""A question-answering task on contexts written by hand."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from wlora.config.schema import TaskConfig
from wlora.tasks.base import build_task
from wlora.tasks.question_answering import QuestionAnswering

Answers = dict[str, list[Any]]
CONTEXT = " ".join(f"w{n}" for n in range(10))
"""20 tokens: the word n is the tokens 2n (`w`) and 2n + 1 (`##n`), from character 3n on."""


def make_config(**fields: Any) -> TaskConfig:
    known: dict[str, Any] = {
        "name": "squad_v2",
        "kind": "question_answering",
        "benchmark": "squad",
        "columns": ["question", "context"],
        "unanswerable": True,
        "validation": ["validation"],
        "metrics": ["exact", "f1"],
        "primary_metric": "f1",
        "max_length": 16,
        "stride": 4,
        "n_best": 5,
        "max_answer_length": 6,
    }
    return TaskConfig(**(known | fields))


def make_task(**fields: Any) -> QuestionAnswering:
    task = build_task(make_config(**fields))
    assert isinstance(task, QuestionAnswering)
    return task


def find(text: str, context: str = CONTEXT) -> Answers:
    return {"text": [text], "answer_start": [context.index(text)]}


NONE: Answers = {"text": [], "answer_start": []}


def make_rows(*answers: Answers, question: str = "who is", context: str = CONTEXT) -> Dataset:
    count = len(answers)
    return Dataset.from_dict({"question": [question] * count, "context": [context] * count, "answers": list(answers)})
