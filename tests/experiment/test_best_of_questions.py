"""`train.best` for questions: they have no validation loss, and some of their metrics exist only for some data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, compose
from tests.support.squad import NONE, find
from wlora.data.sources import load_splits
from wlora.errors import ConfigError
from wlora.experiment.run import run
from wlora.experiment.shared_inputs import require_best

CONTEXT = "Ann saw 2020."


def row(answers: Any) -> str:
    return json.dumps({"context": CONTEXT, "question": "who?", "answers": answers}) + "\n"


def test_a_loss_is_refused_for_questions_only() -> None:
    with pytest.raises(ConfigError) as caught:
        compose("task=squad_v1", "model=tiny_bert", "train.best=loss")
    assert str(caught.value) == "train.best=loss: allowed is exact_match, f1, or null, for task=squad_v1"
    assert compose("task=story_qa", "model=tiny_bert", "train.best=f1").train.best == "f1"
    assert compose("task=story_nli", "model=tiny_bert", "train.best=loss").train.best == "loss"


@pytest.mark.parametrize(
    ("rows", "best", "why"),
    [
        ([NONE, NONE], "HasAns_f1", "no question has an answer"),
        ([find("Ann", CONTEXT)], "NoAns_exact", "every question has an answer"),
        ([find("Ann", CONTEXT), NONE], "HasAns_f1", None),
        ([find("Ann", CONTEXT), NONE], "NoAns_f1", None),
        ([NONE], "f1", None),
    ],
)
def test_a_metric_that_the_data_do_not_have_is_refused(rows: list[Any], best: str, why: str | None, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(row(find("Ann", CONTEXT)) + row(NONE))
    (tmp_path / "validation.jsonl").write_text("".join(map(row, rows)))
    config = compose("task=squad_v2", "model=tiny_bert", f"task.path={tmp_path}", f"train.best={best}")
    splits = load_splits(config.task, offline=True)
    if why is None:
        require_best(config, splits)
        return
    with pytest.raises(ConfigError, match=f"train.best={best}: allowed is a metric that exists for validation, where {why}"):
        require_best(config, splits)


def test_a_run_refuses_it_before_it_trains(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(row(find("Ann", CONTEXT)) * 4)
    words = ["task=squad_v2", f"task.path={tmp_path}", "method=lora", "train.best=NoAns_f1", f"results_dir={tmp_path / 'r'}"]
    with pytest.raises(ConfigError, match="train.best=NoAns_f1"):
        run(compose(*TINY, *words))
    assert not list((tmp_path / "r").glob("records/*.json"))
