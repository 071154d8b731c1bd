"""The report holds everything in itself, escapes what it shows, and says of the records what they say."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.support.synthetic import make_record, watch_loads
from wlora.analysis.report import details
from wlora.cli import report
from wlora.storage.content_hash import hash_bytes
from wlora.storage.records import Record, RecordStore

NAMES = [f"bert.encoder.layer.{layer}.attention.self.value" for layer in (3, 4)]


@pytest.fixture(autouse=True)
def _small_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the bundle takes a second; tests/cli/test_report_browser.py uses the real one."""
    monkeypatch.setattr("wlora.analysis.report.page._vega", lambda: "/* charts */")


def study(results: Path) -> Record:
    for seed, score in enumerate((0.80, 0.82)):
        make_record(results, "method=lora", "task=sst2", f"seed={seed}", metrics=score)
        make_record(results, "method=probe", "task=sst2", f"seed={seed}", metrics=score - 0.1)
    environment = {"precision": "fp32", "wlora": "0.1.0", "processor": "<b>Fast & Co</b>", "git_commit": "abc"}
    environment |= {"overrides": ["task=sst2", "</script><b>"]}
    events = [{"step": 10, "kind": "cut", "omega": dict.fromkeys(NAMES, 0.5)}]
    adapters = [{"name": name, "omega": 0.5, "rank": 8} for name in NAMES]
    fields: dict[str, Any] = {"environment": environment, "events": events, "adapters": adapters}
    made = make_record(results, "method=wlora", "task=sst2", "k=5", metrics=0.9, **fields)
    make_record(results, "method=adalora", "task=sst2", status="diverged")
    return made


def write_page(results: Path, *words: str) -> str:
    report.main([f"results_dir={results}", *words])
    return (results / "report.html").read_text(encoding="utf-8")


def packed(page: str, name: str) -> Any:
    (text,) = re.findall(rf'<script type="text/plain" id="{name}">([\w+/=]+)</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_the_page_has_tables_environments_and_runs_and_nothing_outside(tmp_path: Path) -> None:
    study(tmp_path)
    page = write_page(tmp_path)
    assert "0.8100<small> ± 0.0141 (2)</small>" in page and "<strong>" in page, (
        "LoRA's mean over two seeds, and the best in bold"
    )
    assert not re.search(r"(src|href)=\"(?!#)", page) and "https:" not in page.replace("https://vega.github.io/schema", "")
    assert "&lt;b&gt;Fast &amp; Co&lt;/b&gt;" in page and "<b>Fast" not in page
    assert page.count("</script>") == 4, "no text of a record ends a script"
    assert "python -m wlora.report" in page and "Table 5" not in page, "a table without runs is left out"
    runs = packed(page, "data")["runs"]
    assert runs["status"].count("diverged") == 1 and runs["status"].count("success") == 5
    assert sorted(score for score in runs["last"] if score) == [0.7, 0.72, 0.8, 0.82, 0.9]
    assert not (tmp_path / "tables").exists() and not (tmp_path / "figures").exists(), "the report writes one file"


def test_both_kinds_of_scores_are_on_the_page(tmp_path: Path) -> None:
    record = study(tmp_path)
    curve = b'{"step": 5, "metrics": {"accuracy": 0.95}}\n{"step": 10, "metrics": {"accuracy": 0.9}}\n'
    RecordStore(tmp_path).path(record.run_id).with_suffix(".jsonl").write_bytes(curve)
    page = write_page(tmp_path, "score=best")
    data = packed(page, "data")
    last, best = re.split(r'<div data-score="best">', page.partition('id="tables"')[2])
    assert data["score"] == "best" and "0.9000<small>" in last and "0.9500<small>" in best
    assert data["runs"]["best"][data["runs"]["id"].index(record.run_id)] == 0.95


def test_a_run_has_its_command_curve_and_kept_adapters(tmp_path: Path) -> None:
    record = study(tmp_path)
    store = RecordStore(tmp_path)
    points = [{"step": step, "loss": 1 / step} for step in range(1, 201)] + [{"step": 200, "metrics": {"accuracy": 0.9}}]
    text = "".join(json.dumps(point) + "\n" for point in points)
    store.path(record.run_id).with_suffix(".jsonl").write_text(text)
    record.curve = hash_bytes(text.encode())
    store.write(record)
    page = write_page(tmp_path)
    data, more = packed(page, "data"), packed(page, "more")
    place = data["runs"]["id"].index(record.run_id)
    assert data["runs"]["command"][place] == "python -m wlora.run task=sst2 '</script><b>'"
    assert data["runs"]["command"][place - 1].startswith("python -m wlora.run "), "of a record without its words"
    curve = more["curves"][record.run_id]
    assert len(curve["loss"][0]) == details.POINTS and curve["loss"][0][-1] == 200 and curve["events"] == [10]
    assert curve["metric"] == [[200], [0.9]]
    grid, kept = data["adapters"]["runs"][record.run_id]
    assert data["adapters"]["grids"][grid] == {"layers": 6, "kinds": ["query", "key", "value"]}
    assert kept == [[3, 2, 0.5, 8], [4, 2, 0.5, 8]]


def test_predictions_are_on_the_page_as_classes(tmp_path: Path) -> None:
    record = study(tmp_path)
    store = RecordStore(tmp_path)
    table = pa.table({"label": np.array([0, 1, 1]), "prediction": np.array([0, 0, 1])})
    record.predictions = store.write_predictions(record.run_id, table)
    store.write(record)
    found = packed(write_page(tmp_path), "more")["predictions"]
    assert found["sets"] == [{"task": "sst2", "fold": None, "labels": ["negative", "positive"], "gold": "011"}]
    assert found["runs"] == {record.run_id: [0, "001"]}


def test_classes_are_shown_per_task_and_setting(tmp_path: Path) -> None:
    for seed, confusion in enumerate(([[3, 1], [0, 2]], [[4, 0], [1, 1]])):
        block = {"names": ["<no>", "yes"], "precision": [1.0, 0.5 + seed / 10], "recall": [0.5, 1.0], "f1": [0.8, 0.7]}
        block |= {"support": [4, 2], "macro_f1": 0.75, "weighted_f1": 0.77, "confusion": confusion}
        make_record(tmp_path, "method=lora", "task=rte", f"seed={seed}", classes=block)
    make_record(tmp_path, "method=wlora", "task=stsb", "k=5")
    page = write_page(tmp_path)
    assert "RTE, LoRA: 2 runs" in page and page.count("<h3>RTE, ") == 1
    assert "<td>yes</td><td>0.5500</td><td>1.0000</td><td>0.7000</td><td>4</td>" in page
    assert "<td>&lt;no&gt;</td><td>7</td><td>1</td>" in page, "summed over runs"
    # The runs of other rates, of the tuning seed and without recorded classes are not averaged with the reported ones.
    for seed, rate, more in ((100, 1e-2, {"classes": block}), (100, 5e-4, {"classes": block}), (2, 5e-4, {})):
        score = 0.1 if rate == 1e-2 else 0.5
        make_record(tmp_path, "method=lora", "task=rte", f"seed={seed}", f"lr={rate}", metrics=score, **more)
    assert "RTE, LoRA: 2 of 3 runs" in write_page(tmp_path)


def test_a_study_of_other_tasks_shows_its_summary(tmp_path: Path) -> None:
    make_record(tmp_path, "method=lora", "task=rte", "task.columns=[a,b]", "model=tiny_bert", metrics=0.6123)
    page = write_page(tmp_path)
    assert "0.6123" in page and "rte_own" in page and "Table 1" not in page
    assert re.search(r"<details open><summary><h3>Summary", page)


def test_a_table_that_would_mix_settings_says_so_and_the_rest_is_shown(tmp_path: Path) -> None:
    for steps in (2, 10):
        make_record(tmp_path, "method=wlora", "task=sst2", "k=5", f"method.select_steps={steps}", metrics=0.8)
    page = write_page(tmp_path)
    assert "Not made: table 1, WLoRA K=5 on sst2: runs of different settings" in page
    assert "Not tested: Table 1 would mix settings." in page and "select_steps=10" in page


def test_the_page_of_unfinished_runs_is_made(tmp_path: Path) -> None:
    make_record(tmp_path, "method=lora", "task=sst2", status="failed", error="no <memory>", metrics=0.5)
    page = write_page(tmp_path)
    assert packed(page, "data")["runs"]["error"] == ["no <memory>"]


def test_without_records_there_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "records").mkdir()
    with pytest.raises(SystemExit) as end:
        report.main([f"results_dir={tmp_path}"])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "report.html").exists()


def test_damaged_records_are_named_on_the_page(tmp_path: Path) -> None:
    study(tmp_path)
    (tmp_path / "records" / "0123456789abcdef.json").write_text("{")
    assert re.search(r"<p class=notice>record .*0123456789abcdef.json is damaged", write_page(tmp_path))


@pytest.mark.parametrize(
    ("word", "said"), [("model=minilmm", "did you mean minilm?"), ("score=worst", "score=worst: allowed is last | best")]
)
def test_a_wrong_request_is_refused(word: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path)
    with pytest.raises(SystemExit) as end:
        report.main([f"results_dir={tmp_path}", word])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_the_records_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(tmp_path)
    read = watch_loads(monkeypatch)
    report.main([f"results_dir={tmp_path}"])
    assert len(read) == len(set(read)) > 1
