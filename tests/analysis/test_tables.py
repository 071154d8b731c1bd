from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.synthetic import make_record
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tables.caption import caption, machines, notes
from wlora.analysis.tables.cells import Table, fill
from wlora.analysis.tables.comparisons import compare_rows
from wlora.analysis.tables.grid import count_text, draw, draw_companion, parameters_text
from wlora.analysis.tables.layouts import LAYOUTS, Row, row_of
from wlora.analysis.tables.paper import paper_folder, paper_table, read_printed, unexplained_averages
from wlora.analysis.tables.writing import escape, runs_csv, to_csv, to_latex, to_markdown
from wlora.cli.tables import main
from wlora.errors import ConfigError
from wlora.storage.records import Record, RecordStore

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


# The paper's figures


@pytest.mark.parametrize("name", list("123456"))
def test_the_papers_rows_are_those_of_the_layout(name: str) -> None:
    printed = read_printed(LAYOUTS[name])
    assert len(printed) == len(LAYOUTS[name].rows) and set(printed) == set(LAYOUTS[name].rows)


def test_the_papers_averages_follow_from_its_cells_but_for_three() -> None:
    assert {name: unexplained_averages(LAYOUTS[name]) for name in "1236"} == {
        "1": ["AdaLoRA: the paper prints 0.8099, its cells give 0.8113"],
        "2": ["WLoRA+, r=1: the paper prints 0.8612, its cells give 0.8614"],
        "3": ["WLoRA+, r=2: the paper prints 0.9046, its cells give 0.9032"],
        "6": [],
    }
    assert sum(len(paper_table(LAYOUTS[name]).averages) for name in "1236") == 12 + 12 + 12 + 6


def test_the_papers_corrected_labels_are_noted() -> None:
    for name, printed in (("4", "WLoRA k=15"), ("5", "WLoRA k=48")):
        rows = list(csv.DictReader((paper_folder() / f"table{name}.csv").open(encoding="utf-8")))
        corrected = [row for row in rows if row["printed_label"] == printed]
        assert len(corrected) == 4
        assert all(row["method"] == "wlora_plus" and row["note"].startswith(f"printed as {printed}") for row in corrected)


def test_marks_on_the_papers_figures_are_the_papers_own() -> None:
    """The paper underlines these: Table 4's v2.0 at r=8 and Table 5's CNN/DailyMail at r=1 are ties."""
    second = {
        (name, row.method, row.rank, task)
        for name in "45"
        for (row, task), cell in paper_table(LAYOUTS[name]).cells.items()
        if cell.mark == "second"
    }
    ranks = (1, 2, 4, 8)
    squad = {("4", "lora", rank, "squad_v1") for rank in ranks} | {("4", "lora", rank, "squad_v2") for rank in ranks[1:]}
    squad |= {("4", "wlora", rank, "squad_v2") for rank in (1, 8)}
    summary = {("5", "wlora", rank, "xsum") for rank in ranks} | {("5", "lora", rank, "cnn_dailymail") for rank in ranks}
    assert second == squad | summary | {("5", "wlora", 1, "cnn_dailymail")}


# Filling


def test_a_golden_table(tmp_path: Path) -> None:
    study(tmp_path)
    table = filled(tmp_path)
    assert lines(to_markdown(draw(table))) == [
        "| K | Method | MNLI Acc | SST-2 Acc | CoLA Mcc | QQP Acc/F1 | QNLI Acc | RTE Acc | MRPC Acc/F1 | ALL Avg |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 5 | WLoRA | – | **0.8200 ± 0.0200** (3)† | – | – | – | – "
        "| **0.7200/0.8200 ± 0.0200/0.0200** (3) | **0.7950 ± 0.0200** (3) |",
        "|  | RLoRA | – | <u>0.7700 ± 0.0200</u> (3) | – | – | – | – "
        "| <u>0.6300/0.7300 ± 0.0141/0.0141</u> (2) | <u>0.7250 ± 0.0141</u> (2) |",
    ]
    # 4 runs per cell: the fullest has 3 and 1 that diverged. 14 cells; 4 have runs, 13 of them in all.
    assert notes(table) == [
        f"Missing: {14 * 4 - 12} of 56 runs (4 per cell); a dash is a cell without any.",
        "Diverged (†): 1 of 4 runs of WLoRA K=5 on sst2; not in its mean.",
    ]
    said = caption(table)
    for words in (
        "minilm (1.0M parameters): dev sets, after the last step",
        "seeds 0 to 2",
        "Training: SST-2 (a sample: 100 of 67,349 rows) 50 steps of 32 rows; MRPC (a sample: 100 of 3,668 rows) 50 steps",
        "SST-2 and MRPC the one value that was run",
        "compat=paper, precision=fp32",
        "ALL is over SST-2 and MRPC",
        "The best at each K is bold",
    ):
        assert words in said, words


def test_rounding_and_shared_marks(tmp_path: Path) -> None:
    # 0.80004 and 0.79996 are printed alike, 0.7 is second, 0.6 has no mark.
    for method, score in {"lora": 0.80004, "adalora": 0.79996, "melora": 0.7, "alora": 0.6}.items():
        record(tmp_path, method, "sst2", 0, score)
    table = filled(tmp_path, "1")
    marks = {row.method: cell.mark for (row, task), cell in table.cells.items() if task == "sst2" and cell.runs}
    assert marks == {"lora": "best", "adalora": "best", "melora": "second", "alora": ""}
    assert "| LoRA | 1.00K (0.10%) | – | **0.8000** (1) |" in to_markdown(draw(table))
    assert "One run each (seed 0)." in caption(table)


def test_a_single_row_with_runs_has_no_mark(tmp_path: Path) -> None:
    record(tmp_path, "lora", "sst2", 0, 0.8)
    assert {cell.mark for cell in filled(tmp_path, "1").cells.values()} == {""}


def test_rows_of_each_rank_are_compared_with_each_other(tmp_path: Path) -> None:
    for rank, method, score in ((1, "lora", 0.5), (1, "wlora_plus", 0.6), (2, "lora", 0.9), (2, "wlora_plus", 0.8)):
        record(tmp_path, method, "sst2", 0, score, f"rank={rank}", "targets=all")
    table = filled(tmp_path, "2")
    best = [(row.rank, row.method) for (row, _), cell in table.cells.items() if cell.mark == "best"]
    assert best == [(1, "wlora_plus"), (2, "lora")]
    grid = draw(table)
    assert [line[0] for line in grid.body] == ["1", "", "", "2", "", "", "4", "", "", "8", "", ""]
    assert grid.rules == {3, 6, 9}


def test_a_pair_counts_as_its_mean_in_all(tmp_path: Path) -> None:
    record(tmp_path, "lora", "sst2", 0, 0.6)
    record(tmp_path, "lora", "mrpc", 0, 0.8)
    # (0.6 + (0.8 + 0.9) / 2) / 2
    assert filled(tmp_path, "1").averages[LORA].value == pytest.approx(0.725)


def test_all_is_over_what_no_row_lacks_on_another_model_and_over_everything_on_the_papers(tmp_path: Path) -> None:
    for method, task in (("lora", "sst2"), ("lora", "mrpc"), ("adalora", "sst2")):
        record(tmp_path, method, task, 0, 0.5)
        record(tmp_path, method, task, 0, 0.5, "model=deberta_v3_base")
    assert filled(tmp_path, "1").averaged == ("sst2",)
    own = fill(LAYOUTS["1"], read_runs(tmp_path), model="deberta_v3_base")
    assert own.complete and own.averages == {} and own.seeds == 5
    assert filled(tmp_path, "1").seeds == 1 and filled(tmp_path, "1", seeds=3).seeds == 3


def test_the_chosen_rate_is_reported_and_the_others_are_not_averaged(tmp_path: Path) -> None:
    for lr, score in (("1e-4", 0.6), ("1e-3", 0.7)):
        record(tmp_path, "lora", "sst2", 0, score, f"lr={lr}")
    record(tmp_path, "lora", "sst2", 1, 0.9, "lr=1e-3")
    table = filled(tmp_path, "1")
    cell = table.cells[LORA, "sst2"]
    assert cell.summaries[0].mean == pytest.approx(0.8) and cell.summaries[0].n == 2
    assert "SST-2 the best of 2 on seed 0 of the same dev set" in caption(table)


def test_a_rate_chosen_on_another_task_is_said_so(tmp_path: Path) -> None:
    record(tmp_path, "lora", "mrpc", 0, 0.6, "lr=1e-3", "tune_on=sst2")
    assert "MRPC chosen on sst2" in caption(filled(tmp_path, "1"))


def test_the_k_of_another_model_are_those_of_the_records(tmp_path: Path) -> None:
    for k in (1, 3):
        record(tmp_path, "wlora", "sst2", 0, 0.5, f"k={k}")
    rows = filled(tmp_path, "1").rows
    assert [row.k for row in rows if row.method == "wlora"] == [1, 3]
    assert [(row.method, row.k) for row in filled(tmp_path, "6").rows] == [
        ("wlora", 1), ("rlora", 1), ("wlora", 3), ("rlora", 5), ("rlora", 10)
    ]  # fmt: skip
    own = fill(LAYOUTS["1"], read_runs(tmp_path), model="deberta_v3_base").rows
    assert list(own) == list(LAYOUTS["1"].rows)


def test_methods_beyond_the_papers_get_rows(tmp_path: Path) -> None:
    for method in ("tied_lora", "probe", "lora"):
        record(tmp_path, method, "sst2", 0, 0.5)
    record(tmp_path, "nora", "sst2", 0, 0.5, "rank=4")
    record(tmp_path, "dynamic_lora", "sst2", 0, 0.5, "targets=all")
    table = filled(tmp_path, "1")
    assert [row.label for row in table.rows[len(LAYOUTS["1"].rows) :]] == ["Head only", "Tied-LoRA"]
    assert not table.cells[Row("dynamic_lora", 8), "sst2"].runs


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"numerics": 2}, r"numerics: 1 \| 2"),
        ({"data": "other"}, r"task.data: d \| other"),
        ({"precision": "bf16"}, r"precision: bf16 \| fp32"),
        ({"words": ["task.max_train_rows=50"]}, r"task.max_train_rows: 50 \| null"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_mixed_versions_and_settings_are_refused(tmp_path: Path, method: str, options: dict, named: str) -> None:  # type: ignore[type-arg]
    """Within a cell, and between the rows of a column."""
    words = options.get("words", [])
    options = {key: value for key, value in options.items() if key != "words"}
    record(tmp_path, "lora", "sst2", 0, 0.5)
    record(tmp_path, method, "sst2", 1, 0.6, *words, **options)
    with pytest.raises(ConfigError, match=named):
        filled(tmp_path, "1")


def test_variants_of_a_method_are_refused_within_a_cell_only(tmp_path: Path) -> None:
    record(tmp_path, "wlora", "sst2", 0, 0.5, "k=5", "method.select_steps=20")
    record(tmp_path, "wlora", "mrpc", 0, 0.5, "k=5", "method.select_steps=30")
    filled(tmp_path, "6")
    record(tmp_path, "wlora", "sst2", 1, 0.5, "k=5", "method.select_steps=30")
    with pytest.raises(ConfigError, match=r"table 6, WLoRA K=5 on sst2: .*method.select_steps: 20 \| 30"):
        filled(tmp_path, "6")


def test_two_target_sets_are_refused_in_one_table(tmp_path: Path) -> None:
    record(tmp_path, "lora", "sst2", 0, 0.5, "targets=all")
    record(tmp_path, "wlora", "sst2", 0, 0.5, "targets=release", "k=20")
    with pytest.raises(ConfigError, match=r"method.targets: all \| release\)\nway out: choose, as in method.targets=all"):
        filled(tmp_path, "2")


def test_a_seed_twice_is_refused(tmp_path: Path) -> None:
    record(tmp_path, "lora", "sst2", 0, 0.5, name="first")
    record(tmp_path, "lora", "sst2", 0, 0.6, name="second")
    with pytest.raises(ConfigError, match="table 1, LoRA on sst2: seed=0 is there twice, as records first and second"):
        filled(tmp_path, "1")


def test_unfinished_runs_are_missing_and_wholly_diverged_cells_say_so(tmp_path: Path) -> None:
    for status in ("failed", "oom", "interrupted", "running"):
        record(tmp_path, "lora", "sst2", len(status), 0.5, status=status)
    record(tmp_path, "adalora", "sst2", 0, 0.5, status="diverged")
    record(tmp_path, "adalora", "sst2", 1, 0.5, status="diverged")
    table = filled(tmp_path, "1", seeds=2)
    assert table.cells[LORA, "sst2"].missing == 2
    ada = table.cells[Row("adalora", 8), "sst2"]
    assert (ada.missing, ada.diverged, ada.summaries) == (0, 2, ())
    assert "| AdaLoRA |  | – | diverged (2) |" in to_markdown(draw(table))
    assert "2 of 2 runs of AdaLoRA on sst2" in " ".join(notes(table))


def test_wlora_plus_at_its_default_k_is_the_papers_row(tmp_path: Path) -> None:
    """18 adapters: n / 4 is 5. A record's cut tells n where adapter.path gave fewer."""
    record(tmp_path, "wlora_plus", "sst2", 0, 0.5)
    record(tmp_path, "wlora_plus", "sst2", 1, 0.6, "k=9")
    record(tmp_path, "wlora_plus", "mrpc", 0, 0.5, "method.schedule=halvings")
    cut = {"step": 1, "kind": "cut", "omega": dict.fromkeys(map(str, range(36)), 1.0)}
    record(tmp_path, "wlora_plus", "qnli", 0, 0.7, "k=9", events=[cut])
    table = filled(tmp_path, "1")
    assert [row.label for row in table.rows if row.method == "wlora_plus"] == ["WLoRA+", "WLoRA+ K=9"]
    assert table.cells[Row("wlora_plus", 8, 9), "sst2"].summaries[0].mean == 0.6
    assert {run.task for run in table.runs() if row_of(run) == Row("wlora_plus", 8)} == {"sst2", "mrpc", "qnli"}


def test_wlora_plus_of_today_is_never_averaged_with_that_of_old(tmp_path: Path) -> None:
    old = make_record(tmp_path, "method=wlora_plus", "task=sst2", "method.schedule=halvings", "seed=1")
    del old.config["method"]["revision"]
    RecordStore(tmp_path).write(old)
    record(tmp_path, "wlora_plus", "sst2", 0, 0.5, "method.schedule=halvings")
    with pytest.raises(ConfigError, match=r"WLoRA\+ on sst2: .*method.revision: 2 \| null"):
        filled(tmp_path, "1")


def test_the_tuning_seed_is_not_averaged_and_edges_are_said(tmp_path: Path) -> None:
    for method in ("lora", "adalora", "melora", "flexlora", "alora"):
        for lr, score in (("1e-3", 0.6), ("3e-3", 0.9 if method != "alora" else 0.5)):
            record(tmp_path, method, "sst2", 100, score, f"lr={lr}")
        record(tmp_path, method, "sst2", 0, 0.7, f"lr={'1e-3' if method == 'alora' else '3e-3'}")
    table = filled(tmp_path, "1")
    assert table.cells[LORA, "sst2"].summaries[0].mean == pytest.approx(0.7)
    said = caption(table)
    assert "One run each (seed 0)." in said and "the best of 2 on seed 100" in said
    assert "On SST-2 the largest learning rate tried was chosen for every setting but ALoRA." in said
    assert "On SST-2 the smallest learning rate tried was chosen for ALoRA. A wider grid" in said


def test_a_sample_is_said_to_be_one(tmp_path: Path) -> None:
    for task, rows in (("sst2", 100), ("rte", 2490), ("mrpc", 5000)):
        record(tmp_path, "lora", task, 0, 0.5, task_rows=rows)
    said = caption(filled(tmp_path, "1"))
    assert "SST-2 (a sample: 100 of 67,349 rows)" in said and "RTE (2,490 rows)" in said
    assert "MRPC (5,000 rows, where the benchmark has 3,668)" in said


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
    assert "| LoRA | 1.00K (0.10%) | – | – |" in told.out and "2 runs stand in cells whose best evaluations" in told.out
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "tables" / "table1.csv").open())}
    assert (rows["lora"]["sst2_accuracy"], rows["lora"]["sst2_accuracy_best"]) == ("0.500000", "")


# Comparisons and companions


def test_comparisons_pair_seeds_and_honour_their_seed(tmp_path: Path) -> None:
    study(tmp_path)
    for seed, score in enumerate((0.81, 0.82, 0.83)):
        record(tmp_path, "lora", "sst2", seed, score)
    (against_random,) = compare_rows(filled(tmp_path))
    assert (against_random.a, against_random.b) == (WLORA, RLORA)
    found = against_random.comparison
    # SST-2: +0.05 on three seeds; MRPC: +0.1 on two.
    assert (found.tasks, found.pairs, found.paired) == (2, 5, True)
    assert found.difference.mean == pytest.approx(0.075) and found.probability.mean == 1.0
    answers = compare_rows(filled(tmp_path, "1"), bootstrap_seed=1)
    assert [(answer.a.method, answer.b.method) for answer in answers] == [("wlora", "rlora"), ("wlora", "lora")]
    assert answers[1].comparison.probability.mean == pytest.approx(0.5)  # -0.01, 0, +0.01
    assert answers == compare_rows(filled(tmp_path, "1"), bootstrap_seed=1)


def test_the_companion_shows_the_papers_figure_and_the_difference(tmp_path: Path) -> None:
    record(tmp_path, "lora", "sst2", 0, 0.95)
    record(tmp_path, "lora", "mrpc", 0, 0.9)
    table = filled(tmp_path, "1")
    text = to_markdown(draw_companion(table, read_printed(LAYOUTS["1"])))
    assert "| LoRA | 442K (0.24%) | 0.8797 (–) | 0.9450 (+0.0050) |" in text
    assert "| 0.8897/0.9220 (+0.0103/+0.0780) | 0.8655 (–) |" in text


# Writing


def test_counts_are_written_as_the_paper_does() -> None:
    assert [count_text(n) for n in (184_423_682, 442_368, 12_288, 122_880, 999, 8_030_000_000)] == [
        "184M", "442K", "12.3K", "123K", "999", "8.03B"
    ]  # fmt: skip
    assert parameters_text(None) == ""


def test_parameters_come_from_the_records(tmp_path: Path) -> None:
    counts = {"adapter_initial": 442_368, "adapter_final": 12_288, "base": 0, "head": 5, "total": 184_423_682}
    full = {"adapter_initial": 0, "adapter_final": 0, "base": 183_831_552, "head": 592_130, "total": 184_423_682}
    record(tmp_path, "wlora", "sst2", 0, 0.5, "k=1", parameters=counts)
    record(tmp_path, "full", "sst2", 0, 0.5, parameters=full)
    record(tmp_path, "lora", "sst2", 0, 0.5)
    record(tmp_path, "lora", "mrpc", 0, 0.5, parameters={**counts, "adapter_final": 3000, "total": 1_000_000})
    shown = {row: parameters_text(counts) for row, counts in filled(tmp_path, "1").parameters.items()}
    assert shown == {
        Row("wlora", 8, 1): "12.3K (0.007%)",
        Row("full"): "184M (100%)",
        LORA: "≈2.00K (0.20%)",
    }


def test_latex_prints_special_characters_as_they_stand() -> None:
    assert escape("a_b & 5% #1 ~ ^ {x} \\ $") == (
        r"a\_b \& 5\% \#1 \textasciitilde{} \textasciicircum{} \{x\} \textbackslash{} \$"
    )
    assert escape("±≈−–†") == r"$\pm$$\approx$$-$--$\dagger$"


def test_latex_has_booktabs_spans_marks_and_rules(tmp_path: Path) -> None:
    for method, score in (("lora", 0.9), ("wlora_plus", 0.8)):
        for rank in (1, 2):
            metrics = {"accuracy": score, "f1": score}
            record(tmp_path, method, "sst2", 0, score, f"rank={rank}", "targets=all", metrics=metrics)
    text = to_latex(draw(filled(tmp_path, "2")), caption="a & b", label="tab:2", notes=["50 %"])
    assert r"\caption{a \& b}" in text and r"\footnotesize 50 \%" in text
    assert r"\textbf{0.9000} {\scriptsize (1)}" in text and r"\underline{0.8000}" in text
    assert text.count(r"\midrule") == 1 + 3 and text.count("{") == text.count("}")
    pivot = to_latex(draw(paper_table(LAYOUTS["4"])), caption="", label="")
    assert r" &  & \multicolumn{4}{c}{SQuAD v1.1} & \multicolumn{4}{c}{SQuAD v2.0} \\" in pivot
    assert r"\cmidrule(lr){3-6}" in pivot and r"\cmidrule(lr){7-10}" in pivot
    for line in lines(pivot):
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert line.count("&") == 9


def test_the_csv_joins_the_papers(tmp_path: Path) -> None:
    study(tmp_path)
    (wlora, *_) = csv.DictReader(io.StringIO(to_csv(filled(tmp_path))))
    (paper, *_) = csv.DictReader((paper_folder() / "table6.csv").open(encoding="utf-8"))
    assert set(paper) - {"printed_label", "note"} <= set(wlora)
    assert wlora["method"] == "wlora" and wlora["sst2_accuracy"] == "0.820000" and wlora["sst2_accuracy_std"] == "0.020000"
    assert float(wlora["sst2_accuracy_low"]) >= 0.8 and float(wlora["sst2_accuracy_high"]) <= 0.84
    assert (wlora["sst2_runs"], wlora["sst2_diverged"], wlora["mnli_missing"], wlora["mnli_accuracy"]) == ("3", "1", "4", "")


def test_several_machines_are_named(tmp_path: Path) -> None:
    for seed, capability in enumerate(("AVX2", "AVX2", "AVX512")):
        torch = {"threads": 1, "cpu_capability": capability}
        record(tmp_path, "lora", "sst2", seed, 0.5, environment={"precision": "fp32", "processor": "P", "torch": torch})
        below = " ".join(notes(filled(tmp_path, "1")))
        assert ("P (AVX2, 1 thread) and P (AVX512, 1 thread): seconds" in below) == (seed == 2)


def test_the_long_format_has_every_run(tmp_path: Path) -> None:
    study(tmp_path)
    rows = list(csv.DictReader(io.StringIO(runs_csv(read_runs(tmp_path)))))
    assert len(rows) == 12 and {row["status"] for row in rows} == {"success", "diverged"}
    assert {row["accuracy"] for row in rows if row["status"] == "diverged"} == {""}
    assert all(row["method.targets"] == "qkv" and row["seconds_total"] == "10.0" for row in rows)


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


def test_runs_on_other_numbers_of_threads_and_resumed_elsewhere_are_told(tmp_path: Path) -> None:
    def environment(threads: int, **more: Any) -> dict[str, Any]:
        return {"precision": "fp32", "processor": "A", "torch": {"threads": threads, "cpu_capability": "X"}, **more}

    for seed, told in enumerate((environment(1), environment(2), environment(2, processes=4, earlier=[environment(1)]))):
        make_record(tmp_path, f"seed={seed}", environment=told)
    found = machines(read_runs(tmp_path))
    assert "Runs were computed 1 with 1 thread, 1 with 2 threads and 1 with 4 processes of 2 threads: their sums" in found[1]
    assert found[2].startswith("Of 1 run an earlier part was computed in another environment")
    assert machines(read_runs(tmp_path)[:1]) == []
