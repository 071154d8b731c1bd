"""`python -m wlora.tables`: which tables it writes, and what it prints."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from tests.support.synthetic import make_record
from tests.support.table_study import lines, record, study
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tables.paper import paper_folder
from wlora.analysis.tables.settings import runs_by_setting
from wlora.cli.tables import main
from wlora.storage.records import Record, RecordStore

# Own rows, models, best evaluations


def test_own_rows_stand_in_no_column_of_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "lora", "rte", 0, 0.9123, "task.columns=[left,right]")
    main(["1", f"results_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "0.9123" not in printed and "1 runs on rte_own are not in table 1" in printed
    main(["all", f"results_dir={tmp_path}"])
    assert "| rte_own | LoRA | 0.9123 (1) |" in capsys.readouterr().out
    assert not (tmp_path / "tables" / "table2.md").exists(), "no table of dashes"
    record(tmp_path, "lora", "rte", 0, 0.5)
    main(["all", f"results_dir={tmp_path}"])
    assert "summary.md: 2 settings" in capsys.readouterr().out
    page = (tmp_path / "tables" / "table1.md").read_text(encoding="utf-8")
    assert "0.5000" in page and "0.9123" not in page


def test_a_table_finds_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, task, number in (("minilm", "sst2", 2), ("tiny_bert", "sst2", 1), ("tiny_bart", "xsum", 1)):
        for seed in range(number):
            record(tmp_path, "lora", task, seed, 0.5, f"model={model}", "targets=all", "task.max_length=128")
    main(["all", f"results_dir={tmp_path}"])
    told = capsys.readouterr().out
    assert [line.rpartition("model=")[2] for line in lines(told)] == ["minilm)"] * 4 + ["tiny_bart)", "minilm)"]
    main(["2", f"results_dir={tmp_path}", "model=tiny_bert"])
    assert "(model=tiny_bert)" in capsys.readouterr().out
    record(tmp_path, "lora", "sst2", 0, 0.5, "model=deberta_v3_base", "targets=all")
    main(["2", f"results_dir={tmp_path}"])
    assert "(model=deberta_v3_base)" in capsys.readouterr().out, "the paper's, wherever it has a run"


def curve(results: Path, run: Record, *scores: float) -> None:
    points = [{"step": step, "loss": 1.0, "metrics": {"accuracy": score}} for step, score in enumerate(scores)]
    (results / "records" / f"{run.run_id}.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))


def test_the_best_evaluation_stands_beside_the_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        words = ("method=lora", "task=sst2", f"seed={seed}")
        curve(tmp_path, make_record(tmp_path, *words, metrics=0.5), 0.6, 0.8 + seed / 10, 0.5)
    main(["1", f"results_dir={tmp_path}"])
    assert "| 0.5000 ± 0.0000 (2) |" in capsys.readouterr().out
    main(["1", f"results_dir={tmp_path}", "score=best"])
    printed = capsys.readouterr().out
    assert "| 0.8500 ± 0.0707 (2) |" in printed and "optimistic" in printed and "after the last step" not in printed
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "tables" / "table1.csv").open())}
    assert (rows["lora"]["sst2_accuracy"], rows["lora"]["sst2_accuracy_best"]) == ("0.500000", "0.850000")
    main(["summary", f"results_dir={tmp_path}", "score=best"])
    assert "| 0.8500 ± 0.0707 (2) |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["1", f"results_dir={tmp_path}", "score=first"])
    assert "error: score=first: allowed is last | best" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "{", '{"step": 1, "metrics": 3}\n[1]\n', '{"metrics": {"accuracy": NaN}}\n'])
def test_without_a_curve_the_best_is_empty(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve(tmp_path, make_record(tmp_path, "method=lora", "task=sst2", "seed=0"), 0.9)
    other = make_record(tmp_path, "method=lora", "task=sst2", "seed=1")
    if content is not None:
        (tmp_path / "records" / f"{other.run_id}.jsonl").write_text(content)
    main(["1", f"results_dir={tmp_path}", "score=best"])
    told = capsys.readouterr()
    assert "notice: 1 runs have no readable learning curve with evaluations" in told.err
    assert (
        "| LoRA | 1.00K (0.10%) | – | – |" in told.out
        and "Runs in cells whose best evaluations are not all known: 2" in told.out
    )
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "tables" / "table1.csv").open())}
    assert (rows["lora"]["sst2_accuracy"], rows["lora"]["sst2_accuracy_best"]) == ("0.500000", "")


# The entry point


def test_all_six_are_written_even_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path)
    main(["all", f"results_dir={tmp_path}", "model=minilm"])
    assert len(lines(capsys.readouterr().out)) == 6
    for name in "123456":
        for suffix in ("csv", "md", "tex"):
            assert (tmp_path / "tables" / f"table{name}.{suffix}").is_file()
            assert (tmp_path / "tables" / f"table{name}_paper.{suffix}").is_file() == (suffix != "md")
    page = (tmp_path / "tables" / "table6.md").read_text(encoding="utf-8")
    assert "## Table 6 in the paper" in page and "differences are mostly the models'" in page and "## Comparisons" in page
    assert "| LoRA | F1 | – |" in (tmp_path / "tables" / "table4.md").read_text(encoding="utf-8")
    assert not list((tmp_path / "tables").glob(".*"))


def test_filters_reach_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "lora", "sst2", 0, 0.5)
    record(tmp_path, "lora", "sst2", 0, 0.6, "task.epochs=2")
    main(["1", f"results_dir={tmp_path}", "model=minilm", "task.epochs=2"])
    assert "0.6000 (1)" in capsys.readouterr().out


def test_the_papers_own_tables_are_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in paper_folder().glob("table*.csv"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    main(["all", f"results_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "table 6: ALL follows from the cells in 6 of 6 rows" in printed
    assert "  AdaLoRA: the paper prints 0.8099, its cells give 0.8113" in printed
    assert "| 0.1" not in (tmp_path / "tables" / "table1.md").read_text(encoding="utf-8")
    assert "| 442K (0.24%) |" in (tmp_path / "tables" / "table1.md").read_text(encoding="utf-8")


def test_the_demos_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "wlora", "story_nli", 0, 0.75)
    main(["demo", f"results_dir={tmp_path}"])
    assert "| WLoRA K=5 | 1.00K (0.10%) | 0.7500 (1) |" in capsys.readouterr().out


def test_the_summary_has_a_line_per_setting_with_its_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuts = [{"step": 3, "kind": "cut", "lowest_layer": 2}, {"step": 5, "kind": "cut", "lowest_layer": 4}]
    for seed, score in enumerate((0.5, 0.7)):
        record(tmp_path, "lora", "sst2", seed, score)
        for cost in (0.1, 0.2):
            words = ("method=wlora_depth", "task=sst2", f"seed={seed}", f"method.depth_cost={cost}")
            fields = {"memory": {"process": 2**30, "saved": 2**20 * (1 + seed)}, "events": cuts}
            names = {
                f"bert.encoder.layer.{4 + seed}.attention.self.value": 0.9,
                "bert.encoder.layer.5.attention.self.key": 1.5,
            }
            fields["adapters"] = [{"name": name, "omega": omega + seed, "rank": 8} for name, omega in names.items()]
            make_record(tmp_path, *words, metrics=score + cost, **fields)
    make_record(tmp_path, "method=single", "method.index=3", "task=sst2", metrics=0.4)  # Figure 2's
    main(["summary", f"results_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "| SST-2 | LoRA | 0.6000 ± 0.1414 (2) | 1.00K |  | 8 |  |" in printed
    for cost in (0.1, 0.2):
        assert (
            f"| WLoRA, depth K=5 depth_cost={cost} | {0.6 + cost:.4f} ± 0.1414 (2) | 1.00K | 4.0 | 8 | 2 | 1024 |" in printed
        )
    rows = list(csv.DictReader(io.StringIO((tmp_path / "tables" / "summary.csv").read_text())))
    assert [row["n"] for row in rows] == ["2"] * 3 and rows[1]["saved_bytes"] == str(1.5 * 2**20)
    assert (rows[0]["kept"], rows[0]["omega_low"]) == ("", "")
    assert rows[1]["kept"] == "0: 4.value 5.key; 1: 5.value 5.key"
    assert (rows[1]["omega_low"], rows[1]["omega_high"]) == ("0.9", "2.5")
    assert (tmp_path / "tables" / "summary.md").is_file() and (tmp_path / "tables" / "summary.tex").is_file()


def test_the_summary_tells_all_settings_of_a_method_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "lora", "sst2", 0, 0.5)
    make_record(tmp_path, "method=lora", "task=sst2", "rank=32", "targets=qkv@4", metrics=0.6)
    main(["summary", f"results_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "| LoRA r=8 targets=qkv | 0.5000" in printed and "| LoRA r=32 targets=qkv@4 | 0.6000" in printed


def test_settings_that_share_a_row_are_told_apart_by_their_own_rank_and_k(tmp_path: Path) -> None:
    # The rank of VeRA is not the rank at which it is compared, and halvings do not name their K.
    for own in (256, 1024):
        make_record(tmp_path, "method=vera", "task=sst2", f"method.rank={own}", metrics=0.5)
    for k in (5, 9):
        make_record(tmp_path, "method=wlora_plus", "task=sst2", f"k={k}", "method.schedule=halvings", metrics=0.5)
    found = {label for label, _ in runs_by_setting(read_runs(tmp_path))}
    assert found == {"VeRA rank=256", "VeRA rank=1024", "WLoRA+ k=5", "WLoRA+ k=9"}


def test_a_setting_has_the_same_label_on_all_tasks(tmp_path: Path) -> None:
    for task, targets in (("sst2", "qkv"), ("sst2", "all"), ("mrpc", "qkv")):
        make_record(tmp_path, "method=lora", f"task={task}", f"targets={targets}", metrics=0.5)
    found = {(label, task) for label, task in runs_by_setting(read_runs(tmp_path))}
    assert found == {("LoRA targets=qkv", "sst2"), ("LoRA targets=all", "sst2"), ("LoRA targets=qkv", "mrpc")}


def test_a_key_that_is_left_out_or_null_makes_one_setting(tmp_path: Path) -> None:
    for seed in (0, 1):
        made = make_record(tmp_path, "method=wlora", "task=sst2", "k=5", f"seed={seed}", metrics=0.5)
        if seed:
            del made.config["method"]["select_steps"]
            RecordStore(tmp_path).write(made)
    assert {key: len(group) for key, group in runs_by_setting(read_runs(tmp_path)).items()} == {("WLoRA K=5", "sst2"): 2}


def test_a_task_that_stands_in_for_the_papers_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_record(tmp_path, "method=lora", "task=story_summary", "model=tiny_bart", "targets=all", "rank=4", metrics=0.5)
    main(["5", f"results_dir={tmp_path}", "task=story_summary"])
    assert "| LoRA | R1 | 50.00 (1) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["7"], "table 7 is unknown"),
        (["1", "2"], "allowed is one of 1, 2, 3, 4, 5, 6, demo, all, claims, summary"),
        (["1", "results_dir=nowhere"], "results_dir=nowhere"),
        (["1", "seeds=0"], "seeds=0: allowed is int >= 1"),
        (["1", "bootstrap_seed=x"], "bootstrap_seed=x"),
        (["1", "model=minilmm"], "did you mean minilm?"),
        (["1", "tusk=sst2"], "did you mean task?"),
    ],
)
def test_mistakes_are_told_in_a_line_or_two(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, "lora", "sst2", 0, 0.5)
    where = [] if any(word.startswith("results_dir") for word in words) else [f"results_dir={tmp_path}"]
    with pytest.raises(SystemExit) as end:
        main([*words, *where])
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and len(lines(error)) <= 2
    assert not (tmp_path / "tables").exists()
