"""How the cells of a table are filled from records, and which records are never averaged."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from tests.support.synthetic import make_record
from tests.support.table_study import LORA, filled, lines, record, study
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tables.caption import caption, notes
from wlora.analysis.tables.cells import fill
from wlora.analysis.tables.grid import draw, draw_companion
from wlora.analysis.tables.layouts import LAYOUTS, Row, row_of
from wlora.analysis.tables.paper import read_printed
from wlora.analysis.tables.writing import companion_csv, to_markdown
from wlora.cli.sweep import compose
from wlora.errors import ConfigError
from wlora.storage.records import RecordStore


def test_a_golden_table(tmp_path: Path) -> None:
    study(tmp_path)
    table = filled(tmp_path)
    assert lines(to_markdown(draw(table))) == [
        "| K | Method | SST-2 Acc | MRPC Acc/F1 | ALL Avg |",
        "| --- | --- | ---: | ---: | ---: |",
        "| 5 | WLoRA | **0.8200 ± 0.0200** (3)† | **0.7200/0.8200 ± 0.0200/0.0200** (3) | **0.7950 ± 0.0200** (3)† |",
        "|  | RLoRA | <u>0.7700 ± 0.0200</u> (3) | <u>0.6300/0.7300 ± 0.0141/0.0141</u> (2) | <u>0.7250 ± 0.0141</u> (2) |",
    ]
    # 4 runs per cell: the fullest has 3 and 1 that diverged.
    assert notes(table) == [
        "Cells with fewer than 4 runs: 3 of 4 (runs missing: 4). A dash is a cell without any.",
        "Diverged (†): 1 of 4 runs of WLoRA K=5 on sst2; not in its mean.",
    ]
    said = caption(table)
    for words in (
        "minilm (1.0M parameters): dev sets, after the last step",
        "seeds 0 to 2",
        "Training: SST-2 (a sample: 100 of 67,349 rows) 50 steps of 32 rows; MRPC (a sample: 100 of 3,668 rows) 50 steps",
        "SST-2 and MRPC the one value that was run",
        "compat=paper, precision=fp32",
        "The best at each K is bold",
    ):
        assert words in said, words


def test_the_score_of_the_tuning_seed_is_no_result(tmp_path: Path) -> None:
    for seed in range(2):
        record(tmp_path, "lora", "sst2", seed, 0.8)
    for lr in ("1e-3", "3e-3"):
        record(tmp_path, "wlora", "sst2", 100, 0.9, "k=5", f"lr={lr}")
    table = filled(tmp_path, "1")
    shown = lines(to_markdown(draw(table)))
    assert next(line for line in shown if "WLoRA K=5" in line).count("–") == 2 and "0.9" not in "".join(shown)
    assert notes(table)[1:] == ["Runs on the tuning seed only, which is not reported: WLoRA K=5 on SST-2."]
    record(tmp_path, "wlora", "sst2", 0, 0.7, "k=5", "lr=1e-3")
    assert "0.7000</u> (1)" in to_markdown(draw(filled(tmp_path, "1")))


def test_a_note_names_the_settings_in_which_the_tasks_or_the_claimed_methods_differ(tmp_path: Path) -> None:
    for task in ("sst2", "mrpc"):
        here = "train.fast_step=true" if task == "sst2" else "train.fast_step=false"
        record(tmp_path, "lora", task, 0, 0.8, here)
        record(
            tmp_path, "wlora", task, 0, 0.8, "k=5", "alpha=64", f"method.omega_clipped={str(task == 'mrpc').lower()}", here
        )
    assert notes(filled(tmp_path, "1"))[1:] == [
        "train.fast_step: true for SST-2; false for MRPC.",
        "WLoRA K=5: method.omega_clipped: false for SST-2; true for MRPC.",
        "method.alpha: 32.0 for LoRA; 64.0 for WLoRA K=5.",
    ]


def test_tables_2_and_3_take_the_runs_of_their_own_family(tmp_path: Path) -> None:
    def models() -> list[str]:
        runs = read_runs(tmp_path)
        tables = [fill(LAYOUTS[name], runs) for name in "23"]
        return [table.model if table.runs() else "" for table in tables]

    def add(model: str, *seeds: int) -> None:
        for seed in seeds:
            record(tmp_path, "lora", "sst2", seed, 0.8, "targets=all", f"model={model}")

    add("smollm2_135m", 0)
    assert models() == ["", "smollm2_135m"]
    add("minilm", 0, 1)  # of neither family, with more runs
    assert models() == ["minilm", "smollm2_135m"]
    add("tiny_deberta", 0)
    assert models() == ["tiny_deberta", "smollm2_135m"]
    assert fill(LAYOUTS["2"], read_runs(tmp_path), model="smollm2_135m").runs(), "a given model is shown"


def test_the_family_of_a_table_is_that_of_its_model() -> None:
    for layout in LAYOUTS.values():
        architecture = compose([f"model={layout.model}"]).model.architecture
        assert architecture and architecture["model_type"] == layout.family


def test_a_model_of_no_family_is_shown_where_there_is_no_other(tmp_path: Path) -> None:
    record(tmp_path, "lora", "sst2", 0, 0.8, "targets=all")
    assert [fill(LAYOUTS[name], read_runs(tmp_path)).model for name in "23"] == ["minilm", "minilm"]


def test_rounding_and_shared_marks(tmp_path: Path) -> None:
    # 0.80004 and 0.79996 are printed alike, 0.7 is second, 0.6 has no mark.
    for method, score in {"lora": 0.80004, "adalora": 0.79996, "melora": 0.7, "alora": 0.6}.items():
        record(tmp_path, method, "sst2", 0, score)
    table = filled(tmp_path, "1")
    marks = {row.method: cell.mark for (row, task), cell in table.cells.items() if task == "sst2" and cell.runs}
    assert marks == {"lora": "best", "adalora": "best", "melora": "second", "alora": ""}
    assert "| LoRA | 1.00K (0.10%) | **0.8000** (1) |" in to_markdown(draw(table))
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
    assert [line[0] for line in grid.body] == ["1", "", "", "2", "", ""]  # no run has rank 4 or 8
    assert grid.rules == {3}


def test_another_models_table_has_the_tasks_and_ranks_that_were_run_and_the_papers_table_all(tmp_path: Path) -> None:
    for seed in (0, 1):
        record(tmp_path, "lora", "story_summary", seed, 0.5, "rank=4", "targets=all", "model=tiny_bart")
    table = fill(LAYOUTS["5"], read_runs(tmp_path))
    assert table.model == "tiny_bart"
    assert "on summarisation at rank 4 (ROUGE-1)" in caption(table)
    assert "Story summary is a generated task in place of XSum and CNN/DailyMail." in caption(table)
    assert [heading for heading in draw(table).headings if heading[0]] == [("Story summary", "r=4")]
    printed = read_printed(LAYOUTS["5"])
    beside = draw_companion(table, LAYOUTS["5"], printed)
    assert {upper for upper, _ in beside.headings if upper} == {"XSum", "CNN/DailyMail"} and len(beside.headings) == 10
    assert "35.96 (–)" in to_markdown(beside)
    assert all(line["ours"] == "" for line in csv.DictReader(io.StringIO(companion_csv(table, printed))))


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
    with pytest.raises(ConfigError, match="table 1, LoRA on sst2: seed=0 exists twice, as records first and second"):
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
    assert "| AdaLoRA |  | diverged (2) | – |" in to_markdown(draw(table))
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
