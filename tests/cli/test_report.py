"""The report holds everything in itself and escapes what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.synthetic import make_record, watch_loads
from wlora.cli import report


def study(results: Path) -> None:
    for seed, score in enumerate((0.80, 0.82)):
        make_record(results, "method=lora", "task=sst2", f"seed={seed}", metrics=score)
        make_record(results, "method=probe", "task=sst2", f"seed={seed}", metrics=score - 0.1)
    environment = {"precision": "fp32", "wlora": "0.1.0", "processor": "<b>Fast & Co</b>", "git_commit": "abc"}
    make_record(results, "method=wlora", "task=sst2", "k=5", metrics=0.9, environment=environment)
    make_record(results, "method=adalora", "task=sst2", status="diverged")


def test_the_page_has_tables_figures_environments_and_runs_and_nothing_outside(tmp_path: Path) -> None:
    study(tmp_path)
    report.main([f"results_dir={tmp_path}"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "0.8100 ± 0.0141" in page and "<strong>" in page, "LoRA's mean over two seeds, and the best in bold"
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=\"(?!data:image/png|#)", page), "nothing is fetched"
    assert "&lt;b&gt;Fast &amp; Co&lt;/b&gt;" in page and "<b>Fast" not in page
    assert page.count("<td>diverged</td>") == 1 and page.count("<td>success</td>") == 5
    assert "python -m wlora.tables all" in page
    assert "Table 5" not in page, "a table without runs is left out"
    assert "Left out: dot_products (no successful run of method=single;" in page


def test_classes_are_shown_per_task_and_method(tmp_path: Path) -> None:
    for seed, confusion in enumerate(([[3, 1], [0, 2]], [[4, 0], [1, 1]])):
        block = {"names": ["<no>", "yes"], "precision": [1.0, 0.5 + seed / 10], "recall": [0.5, 1.0], "f1": [0.8, 0.7]}
        block |= {"support": [4, 2], "macro_f1": 0.75, "weighted_f1": 0.77, "confusion": confusion}
        make_record(tmp_path, "method=lora", "task=rte", f"seed={seed}", classes=block)
    make_record(tmp_path, "method=wlora", "task=stsb", "k=5")
    report.main([f"results_dir={tmp_path}"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "method=lora: 2 runs" in page and page.count("<h3>rte") == 1
    assert "<td>yes</td><td>0.5500</td><td>1.0000</td><td>0.7000</td><td>4</td>" in page
    assert "<td>&lt;no&gt;</td><td>7</td><td>1</td>" in page, "summed over runs"


def test_a_study_of_other_tasks_shows_its_summary(tmp_path: Path) -> None:
    make_record(tmp_path, "method=lora", "task=story_nli", metrics=0.7123)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "table1.md").write_text("# Table 1\n\n| x (3) |")  # another command's
    make_record(tmp_path, "method=lora", "task=rte", "task.columns=[a,b]", "model=tiny_bert", metrics=0.6123)
    report.main([f"results_dir={tmp_path}"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "0.7123" in page and "rte_own" in page and "minilm, tiny_bert" in page and "Table 1" not in page


def test_without_records_there_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "records").mkdir()
    with pytest.raises(SystemExit) as end:
        report.main([f"results_dir={tmp_path}"])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "report.html").exists()


def test_a_refused_filter_is_told_as_the_tables_tell_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path)
    with pytest.raises(SystemExit) as end:
        report.main([f"results_dir={tmp_path}", "model=minilmm"])
    assert end.value.code == 2 and "did you mean minilm?" in capsys.readouterr().err


def test_the_records_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(tmp_path)
    read = watch_loads(monkeypatch)
    report.main([f"results_dir={tmp_path}"])
    assert len(read) == len(set(read)) > 1
