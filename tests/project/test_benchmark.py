"""The benchmark runs, and README and docs quote what it wrote."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.tape import Tape
from wlora.training import graphs

pytestmark = pytest.mark.integration

CUT = "WLoRA cut"
STAGES = ["PEFT LoRA", "LoRA", "WLoRA before the cut", CUT, f"{CUT}, prefix", f"{CUT}, prefix, micro-batch grown"]
TIMED = [*STAGES[:3], "LoRA, fast", f"{CUT}, fast", f"{CUT}, fast, prefix", *STAGES[3:]]
MODELS = {"DeBERTaV3-base": "deberta", "BART-large": "bart", "SmolLM2-135M": "llama", "MiniLM-L6": "minilm"}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import `scripts/benchmark.py`, which finds the modules beside it as it does when Python runs it."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("benchmark")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import `scripts/benchmark_runs.py`."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("benchmark_runs")


def stage(what: str) -> str:
    return re.sub(r" of \d+ stored", "", what)


def test_steps_are_timed_and_compared_with_peft(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("task=mrpc", "model=tiny_bert", "model.architecture.num_hidden_layers=4")
    kept = r"\.2\..*\.(key|value)|\.3\."
    monkeypatch.setattr(benchmark, "CASES", {"tiny": benchmark.Case(words, 8, 16, kept)})
    monkeypatch.setattr(benchmark, "fast_precision", lambda: "bf16")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "steps", "--repeats", "1", "--times", "2", "--out", str(tmp_path)])
    benchmark.main()
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [(stage(row["what"]), row["precision"]) for row in rows] == [(s, p) for p in ("fp32", "bf16") for s in TIMED]
    found = {(stage(row["what"]), row["precision"]): row for row in rows}
    assert found["PEFT LoRA", "fp32"]["time_to_peft"] == 1 and found["LoRA", "fp32"]["batch"] == "16×16"
    assert found["WLoRA cut", "fp32"]["saved_to_peft"] < found["LoRA", "fp32"]["saved_to_peft"] <= 1
    assert found["LoRA", "bf16"]["saved_mib"] < found["LoRA", "fp32"]["saved_mib"]
    # More rows mean no more operations; a shorter backward pass fewer, and no product is faster than the machine's.
    assert 0 < found["WLoRA cut", "fp32"]["operations"] < found["LoRA", "fp32"]["operations"]
    assert all(row["time_to_limit"] > 1 for row in rows)
    assert (tmp_path / "steps.md").read_text().count("\n") == len(rows) + 2


def test_graphs_are_timed_beside_peft_where_there_are_any(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["benchmark.py", "graphs", "--repeats", "3", "--models", "minilm", "--out", str(tmp_path)]
    )
    benchmark.main()
    found = json.loads((tmp_path / "graphs.json").read_text())
    assert (found["skipped"], found["rows"]) == ("it needs CUDA", []) and "skipped" in capsys.readouterr().out
    words = ("task=mrpc", "model=tiny_bert", "model.architecture.num_hidden_layers=4")
    monkeypatch.setattr(benchmark, "CASES", {"minilm": benchmark.Case(words, 8, 16, r"\.2\..*\.(key|value)|\.3\.")})
    monkeypatch.setattr(benchmark, "has_graphs", lambda device: True)
    monkeypatch.setattr(graphs, "CudaRecorder", Tape)
    benchmark.main()
    rows = json.loads((tmp_path / "graphs.json").read_text())["rows"]
    ours = STAGES[1:5]
    assert [stage(row["what"]) for row in rows] == ["PEFT LoRA", *ours, *(f"{what}, graphs" for what in ours)]
    assert rows[0]["time_to_peft"] == 1 and all(row["ms"] > 0 for row in rows)


def test_memory_stands_beside_the_authors_measurements(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmark_memory import AUTHORS

    from wlora.experiment.memory_estimate import Memory

    memory = sys.modules["benchmark_memory"]
    told = [Memory(36, 2**30, 0, 2**31), Memory(1, 2**30, 0, 2**30)]
    monkeypatch.setattr(memory, "estimate", lambda *_: told)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "memory", "--out", str(tmp_path)])
    benchmark.main()
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [(row["batch"], row["adapters"]) for row in rows] == [(f"{b}×128", k) for b in (32, 64) for k in (1, 20, 36)]
    assert [row["authors_gib"] for row in rows] == [gib for of_batch in AUTHORS.values() for gib in of_batch.values()]
    assert {row["dry_run_gib"] for row in rows} == {2.0} and {row["peak_gib"] for row in rows} == {None}


@pytest.mark.slow
def test_the_check_of_a_gpu_leaves_json_for_every_part_and_says_what_is_skipped(tmp_path: Path) -> None:
    """The parts `steps` and `packs` are run by other tests, in this process."""
    words = {"OUT": str(tmp_path), "SMALL": "1", "PARTS": "tests graphs", "LIMIT": "600"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "scripts/gpu_check.sh"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **words, "PATH": path, "CUDA_VISIBLE_DEVICES": ""},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert {name: part["ended"] for name, part in parts.items()} == dict.fromkeys(words["PARTS"].split(), "done")
    tests = json.loads((tmp_path / "tests.json").read_text())
    assert tests["skipped"] == 1 and not tests["failed"] and not tests["passed"]
    assert json.loads((tmp_path / "graphs.json").read_text())["skipped"] == "it needs CUDA"


def test_whole_runs_are_compared_with_each_form_of_batches(runs: Any) -> None:
    seconds = {runs.PEFT["grouped"]: [40, 50, 60], runs.PEFT["random"]: [80], runs.PEFT["padded"]: [200]}
    seconds["WLoRA"] = [20, 30, 30]
    scores = {"WLoRA": 0.75, runs.PEFT["grouped"]: 0.75, runs.PEFT["random"]: 0.9, runs.PEFT["padded"]: 0.9}
    found = {
        name: [runs.Outcome(s, scores[name], 1000, None, [(s / 2, 0.735), (s, 0.745)]) for s in of_seeds]
        for name, of_seeds in seconds.items()
    }
    rows = {row["what"]: row for row in runs.summarize("mrpc", found)}
    for batches, name in runs.PEFT.items():
        assert rows[name][f"time_to_{batches}"] == 1
    ours = rows["WLoRA"]
    assert (ours["time_to_grouped"], ours["time_to_random"], ours["time_to_padded"]) == (0.5, 0.25, 0.1)
    # The target comes from PEFT with grouped batches, whatever the other forms reach.
    assert (ours["target"], ours["to_target_s"], ours["reached"]) == (0.74, 30, "3 of 3")


def test_packs_are_timed_beside_a_run_alone_and_end_in_order(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packs = sys.modules["benchmark_packs"]
    monkeypatch.setattr(packs, "MODELS", {"tiny": ["model=tiny_bert"]})
    monkeypatch.setattr(packs, "fast_precision", lambda: "fp32")
    args = argparse.Namespace(models=["tiny"], sizes=[1, 2], repeats=1, warm_up=1)
    rows = list(packs.time_packs(args))
    assert [(row["runs"], row["seeds"]) for row in rows] == [(1, "one"), (2, "one"), (2, "own")]
    assert all(row["operations_per_run"] < 1 for row in rows[1:]) and all(row["pack_to_limit"] > 1 for row in rows)
    gc.collect()
    said = capsys.readouterr()
    assert "taken over" not in said.out + said.err


def test_runs_of_two_machines_are_not_compared(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mrpc.json").write_text('{"machine": "1 × a GPU"}')
    with pytest.raises(SystemExit, match="contains runs of 1 × a GPU, but this is 1 × another"):
        runs.refuse_others(tmp_path, "1 × another")


@pytest.mark.parametrize(
    ("page", "heading", "folders", "precision"),
    [
        ("docs/benchmarks.md", "H100, bfloat16", ["h100", "h100_minilm"], "bf16"),
        ("docs/benchmarks.md", "2 cores (AVX2), float32", ["zen3"], "fp32"),
        ("README.md", "H100, bfloat16", ["h100", "h100_minilm"], "bf16"),
    ],
)
def test_the_texts_quote_what_was_measured(page: str, heading: str, folders: list[str], precision: str) -> None:
    files = [ROOT / "results" / "benchmarks" / folder / "steps.json" for folder in folders]
    if not all(file.is_file() for file in files):
        pytest.skip("an sdist has no results")
    rows = [row for file in files for row in json.loads(file.read_text())["rows"] if row["precision"] == precision]
    found = {(row["model"], stage(row["what"])): row for row in rows}
    text = (ROOT / page).read_text(encoding="utf-8")
    _, _, rest = text.partition(f"| {heading} |")
    lines = rest.split("\n\n", 1)[0].splitlines()[2:]
    assert len(lines) == len(MODELS)
    for line in lines:
        title, peft, *ratios = (cell.strip() for cell in line.strip("| ").split("|"))
        name, batch = title.split(", ")
        first = found[MODELS[name], "PEFT LoRA"]
        assert (peft, batch) == (f"{first['ms']:,} ms", first["batch"])
        expected = [found[MODELS[name], what]["time_to_peft"] for what in STAGES[1:]]
        expected.append(found[MODELS[name], CUT]["saved_to_peft"])
        columns = 4 if page == "README.md" else len(expected)
        assert ratios == [f"{ratio:.3f}" for ratio in expected[:columns]]
    if page != "README.md" and precision == "bf16":
        shares = sorted(found[name, "LoRA"]["time_to_own_fp32"] for name in MODELS.values())
        assert f"bfloat16 takes {shares[0]:.2f} to {shares[-1]:.2f} of float32's time" in " ".join(text.split())


def test_the_benchmarks_page_quotes_the_whole_runs() -> None:
    files = [ROOT / "results" / "benchmarks" / f"zen5_{task}" / "end_to_end.json" for task in ("sst2", "mrpc")]
    if not files[0].is_file():
        pytest.skip("an sdist has no results")
    titles, expected = {"sst2": "SST-2", "mrpc": "MRPC"}, []
    for row in (row for file in files for row in json.loads(file.read_text())["rows"]):
        ratios = [f"{row[f'time_to_{form}']:.3f}" for form in ("grouped", "random", "padded")]
        cells = [f"{titles[row['task']]}, {row['what']}", f"{row['train_s']:.1f}", *ratios, f"{row['mean_accuracy']:.4f}"]
        if row["what"] not in ("PEFT + Trainer, random", "PEFT + Trainer, padded"):
            expected.append(cells)
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("| One core (Zen 5), bfloat16 | Train s |")
    shown = [line.strip("| ").split(" | ") for line in rest.split("\n\n", 1)[0].splitlines()[2:]]
    assert shown == expected


def test_the_benchmarks_page_quotes_the_faster_steps() -> None:
    file = ROOT / "results" / "benchmarks" / "zen5" / "steps.json"
    if not file.is_file():
        pytest.skip("an sdist has no results")
    found = {(stage(row["what"]), row["precision"]): row for row in json.loads(file.read_text())["rows"]}
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("| MiniLM-L6 32×53, one core (Zen 5) |")
    lines = rest.split("\n\n", 1)[0].splitlines()[2:]
    assert len(lines) == 6
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
        rows = [found[name.removesuffix(" stored"), precision] for precision in ("fp32", "bf16")]
        expected = [cell for row in rows for cell in (f"{row['time_to_peft']:.3f}", f"{row['time_to_limit']:.2f}")]
        assert cells == [*expected, f"{rows[1]['operations']:,}"]
