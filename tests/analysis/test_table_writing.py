"""The paper's figures beside ours, comparisons, and the written forms of a table."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.synthetic import make_record
from tests.support.table_study import LORA, RLORA, WLORA, filled, lines, record, study
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tables.caption import machines, notes
from wlora.analysis.tables.comparisons import compare_rows
from wlora.analysis.tables.grid import count_text, draw, draw_companion, parameters_text
from wlora.analysis.tables.layouts import LAYOUTS, Row
from wlora.analysis.tables.paper import paper_folder, paper_table, read_printed, unexplained_averages
from wlora.analysis.tables.writing import escape, runs_csv, to_csv, to_latex, to_markdown

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


# Comparisons and companions


def test_comparisons_pair_seeds_and_honour_their_seed(tmp_path: Path) -> None:
    study(tmp_path)
    for seed, score in enumerate((0.81, 0.82, 0.83)):
        record(tmp_path, "lora", "sst2", seed, score)
    (against_random,) = compare_rows(filled(tmp_path))
    assert (against_random.a, against_random.b) == (WLORA, RLORA)
    found = against_random.comparison
    # SST-2: +0.05; MRPC: +0.1, on two seeds, so that the third one of SST-2 is left out.
    assert (found.tasks, found.pairs, found.paired) == (2, 4, True)
    assert found.difference.mean == pytest.approx(0.075) and found.probability.mean == 1.0
    answers = compare_rows(filled(tmp_path, "1"), bootstrap_seed=1)
    assert [(answer.a.method, answer.b.method) for answer in answers] == [("wlora", "rlora"), ("wlora", "lora")]
    assert answers[1].comparison.probability.mean == pytest.approx(0.5)  # -0.01, 0, +0.01
    assert answers == compare_rows(filled(tmp_path, "1"), bootstrap_seed=1)


def test_the_companion_shows_the_papers_figure_and_the_difference(tmp_path: Path) -> None:
    record(tmp_path, "lora", "sst2", 0, 0.95)
    record(tmp_path, "lora", "mrpc", 0, 0.9)
    table = filled(tmp_path, "1")
    text = to_markdown(draw_companion(table, LAYOUTS["1"], read_printed(LAYOUTS["1"])))
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
    assert escape("±≈≥−–†") == r"$\pm$$\approx$$\geq$$-$--$\dagger$"
    assert escape("[2024] x") == "{[}2024] x", "behind the end of a line it would be its option"


def test_the_committed_tables_have_only_characters_that_latex_knows() -> None:
    pages = {file: file.read_text(encoding="utf-8") for file in sorted((ROOT / "results").glob("*/tables/*.tex"))}
    assert pages
    for file, page in pages.items():
        assert {letter for letter in page if ord(letter) > 127} <= set("“”é"), file


def test_latex_has_booktabs_spans_marks_and_rules(tmp_path: Path) -> None:
    for method, score in (("lora", 0.9), ("wlora_plus", 0.8)):
        for rank in (1, 2):
            metrics = {"accuracy": score, "f1": score}
            record(tmp_path, method, "sst2", 0, score, f"rank={rank}", "targets=all", metrics=metrics)
    text = to_latex(draw(filled(tmp_path, "2")), caption="a & b", label="tab:2", notes=["50 %"])
    assert r"\caption{a \& b}" in text and r"\footnotesize 50 \%" in text
    assert r"\textbf{0.9000} {\scriptsize (1)}" in text and r"\underline{0.8000}" in text
    assert text.count(r"\midrule") == 1 + 1 and text.count("{") == text.count("}")
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
    assert {"method", "rank", "k", "sst2_accuracy", "mrpc_accuracy", "mrpc_f1", "all"} <= set(wlora) & set(paper)
    assert wlora["method"] == "wlora" and wlora["sst2_accuracy"] == "0.820000" and wlora["sst2_accuracy_std"] == "0.020000"
    assert float(wlora["sst2_accuracy_low"]) >= 0.8 and float(wlora["sst2_accuracy_high"]) <= 0.84
    assert (wlora["sst2_runs"], wlora["sst2_diverged"], wlora["sst2_missing"], wlora["mrpc_missing"]) == ("3", "1", "0", "1")


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


def test_runs_on_other_numbers_of_threads_and_resumed_elsewhere_are_told(tmp_path: Path) -> None:
    def environment(threads: int, **more: Any) -> dict[str, Any]:
        return {"precision": "fp32", "processor": "A", "torch": {"threads": threads, "cpu_capability": "X"}, **more}

    for seed, told in enumerate((environment(1), environment(2), environment(2, processes=4, earlier=[environment(1)]))):
        make_record(tmp_path, f"seed={seed}", environment=told)
    found = machines(read_runs(tmp_path))
    assert "Runs were computed 1 with 1 thread, 1 with 2 threads and 1 with 4 processes of 2 threads: their sums" in found[1]
    assert found[2].startswith("Of 1 run an earlier part was computed in another environment")
    assert machines(read_runs(tmp_path)[:1]) == []
