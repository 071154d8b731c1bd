"""The commands of the README and of docs/ run, small and local."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, compose, enter_main
from tests.support.llama_folder import build_llama_folder, write_gguf
from tests.support.model_folders import build_model_folder
from tests.support.pages import PAGES, README, blocks
from wlora.cli import export as exports
from wlora.cli import figures, memory, tables
from wlora.cli import predict as predictions
from wlora.config.schema import ModelConfig, config_folder
from wlora.experiment import run as experiment
from wlora.models.source import READS_GGUF, locate
from wlora.storage.records import Record, RecordStore

pytestmark = pytest.mark.integration

# A command that stands on several pages is checked once.
LINES = list(dict.fromkeys(line for page in PAGES.values() for block in blocks(page, "bash") for line in block.splitlines()))
QUICK = {
    line for block in blocks(README, "bash") for line in block.splitlines()
}  # the commands of other pages are slow tests
SETUP = [line for line in LINES if line.startswith("pip install")]
LAUNCHED = [line for line in LINES if re.search(r"^(accelerate|torchrun) |hydra/launcher=|hardware=", line)]
PREDICTIONS = [line for line in LINES if line.startswith("python -m wlora.predict ")]
AFTERWARDS = [line for line in LINES if "RUN_ID" in line and line not in PREDICTIONS]
RUNS = [line for line in LINES if line.startswith("python -m wlora.run ") and line not in AFTERWARDS + LAUNCHED]
SCRIPTS = [line for line in LINES if line.startswith("python scripts/")]
STUDIES = [line for line in LINES if re.search(r"(^| )scripts/\w+\.sh$", line)]
TABLES = [line for line in LINES if line.startswith("python -m wlora.tables ")]
FIGURES = [line for line in LINES if re.match(r"python -m wlora\.(figures|memory|report) ", line)]
COMPLETION = [line for line in LINES if line.startswith("eval ")]
CLASSES = ("bug", "praise", "question")  # of the folder DATA/tickets

TRAIN_ROWS, EVAL_ROWS = 8, 6
# Enough steps for the default T of every method; enough layers for every explicit k.
SMALL = ["task.batch_size=4", "train.accumulation_steps=1", "train.max_steps=24", "seed=0"]
LAYERS = "model.architecture.num_hidden_layers=4"
BART = ("model.architecture.encoder_layers=4", "model.architecture.decoder_layers=4", "task.max_length=64")
LOOKS = ("--help", "--cfg", "-sc")

Enter = Callable[..., int]


def in_tiers(lines: list[str]) -> list[Any]:
    return [line if line in QUICK else pytest.param(line, marks=pytest.mark.slow) for line in lines]


def rows_of(task: Any, number: int) -> dict[str, list[Any]]:
    """Write rows in a task's schema."""
    subjects = ("Anna", "Ben", "Clara", "David")
    endings = ("is in the garden.", "left the kitchen.", "has the book.")
    texts = [f"{subjects[i % 4]} {endings[i % 3]}" for i in range(number)]
    labels: list[Any] = [i % len(task.labels) if task.labels else i % 6 - 0.5 for i in range(number)]
    answers = [{"text": [text.split()[0]], "answer_start": [0]} for text in texts]
    return {**dict.fromkeys(task.columns, texts), "label": labels, "answers": answers}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of every benchmark, in its own schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("data")
    benchmarks = [
        file.stem for file in (config_folder() / "task").glob("*.yaml") if "benchmark: table" not in file.read_text()
    ]
    for name in benchmarks:
        task = compose(f"task={name}", "model=tiny_bart", "task.max_length=512").task
        (folder / task.name).mkdir()
        for split in ("train", *task.validation, "test"):
            rows = rows_of(task, TRAIN_ROWS if split == "train" else EVAL_ROWS)
            pq.write_table(pa.table(rows), folder / task.name / f"{split}.parquet")
    (folder / "tickets").mkdir()
    for split in ("train", "validation"):
        lines = [f'"It fails, ""again"", {row}",{CLASSES[row % 3]}' for row in range(TRAIN_ROWS)]
        (folder / "tickets" / f"{split}.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    own = [f'{row},"It fails,\n""again"", {row}",{CLASSES[row % 7 % 3]}' for row in range(28)]
    (folder / "tickets.csv").write_text("\n".join(["id,text,kind", *own]), encoding="utf-8")
    topics = [f"Anna plays {row},{row % 2},{row % 3 // 2},0" for row in range(28)]
    (folder / "topics.csv").write_text("\n".join(["text,sport,news,food", *topics]), encoding="utf-8")
    (folder / "new.csv").write_text("\n".join(["id,text", *(f"{row},again {row}" for row in range(5))]), encoding="utf-8")
    (folder / "conf" / "task").mkdir(parents=True)
    (yaml,) = blocks(PAGES["docs/tasks.md"], "yaml")
    (folder / "conf" / "task" / "tickets.yaml").write_text(yaml.replace("DATA", str(folder)), encoding="utf-8")
    return folder


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Enter]:
    """Return a function that calls the entry point in this process, away from the hub, and returns the exit code."""
    import huggingface_hub.constants as hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", hub.HF_HUB_OFFLINE)  # offline=true sets these; the test restores them
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)

    return lambda *words: enter_main(monkeypatch, *words)


def minilm() -> str:
    config = compose("model=minilm").model
    return str(locate(ModelConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})).location)


def lora_folder(folder: Path, data: Path) -> Path:
    """Train a small adapter on the model that `shrink` chooses."""
    record = experiment.run(compose(*shrink("python -m wlora.run task=rte method=lora", data, folder)))
    return folder / "adapters" / record.run_id


def shrink(line: str, data: Path, results: Path) -> list[str]:
    """Return the arguments of a command, with overrides appended that make it small and local."""
    words = shlex.split(line.replace("DATA", str(data)))[3:]
    if "adapter.path=DIR" in words:
        words[words.index("adapter.path=DIR")] = f"adapter.path={lora_folder(results.parent / 'lora', data)}"
    if any(word in LOOKS for word in words):
        return words
    words.append(f"results_dir={results}")
    if "dry_run=true" in words:
        return words
    if "model.path=MODEL" in words:
        words[words.index("model.path=MODEL")] = f"model.path={minilm()}"
        words.append("model=minilm")
    elif "model.path=ROBERTA" in words:
        words[words.index("model.path=ROBERTA")] = f"model.path={build_model_folder('roberta', results.parent / 'roberta')}"
    elif "model.gguf_file=NAME.gguf" in words:
        pytest.importorskip("transformers", minversion=READS_GGUF)
        write_gguf(results.parent / "NAME.gguf")
        words[words.index("model.path=DIR")] = f"model.path={results.parent}"
    elif "model=llama3_8b" in words:
        words.append(f"model.path={build_llama_folder(results.parent / 'llama')}")
    elif any(re.fullmatch(r"model=\w*bart\w*", word) for word in words):
        words += ["model=tiny_bart", *BART]
    else:
        words += [f"model={'tiny_bert' if '-m' in words else 'tiny_deberta'}", LAYERS]  # a sweep with the faster one
    if "-m" in words:
        words.append("lr=5e-4")  # one of its rates and, below, one of its seeds
    if not any(word.startswith(("task.path=", "--config-dir=")) for word in words):
        words.append(f"task.path={data}/${{task.name}}")
    return [*words, *SMALL]


def records_in(results: Path) -> list[Record]:
    return list(RecordStore(results))


def test_every_line_is_a_command_that_is_checked_here() -> None:
    assert len(SETUP) == 2 and RUNS and SCRIPTS and STUDIES and TABLES and FIGURES and COMPLETION
    known = LAUNCHED + AFTERWARDS + PREDICTIONS + SETUP + RUNS + SCRIPTS + STUDIES + TABLES + FIGURES + COMPLETION
    assert sorted(LINES) == sorted(known)


def test_setup_installs_extras_that_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in SETUP:
        match = re.fullmatch(r"pip install -e '\.\[(\w+)\]' && python -m (wlora\.run experiment=(\w+)|pytest)", line)
        assert match, line
        assert re.search(rf"^{match[1]} = \[", project, re.MULTILINE)
        assert match[3] is None or (config_folder() / "experiment" / f"{match[3]}.yaml").is_file()


@pytest.mark.parametrize("line", in_tiers(RUNS))
def test_command_runs(line: str, enter: Enter, data: Path, tmp_path: Path) -> None:
    words = shrink(line, data, tmp_path / "results")
    assert enter(*words) == 0
    records = records_in(tmp_path / "results")
    assert bool(records) != any(word in (*LOOKS, "dry_run=true") for word in words)
    assert {record.status for record in records} <= {"success", "stopped" if "race=halving" in words else "success"}


@pytest.mark.parametrize("line", in_tiers(LAUNCHED))
def test_what_is_launched_composes(line: str, enter: Enter, capsys: pytest.CaptureFixture[str]) -> None:
    """tests/training/test_processes.py and tests/cli/test_launchers.py launch."""
    launcher, words = line.split(" -m wlora.run ")
    assert launcher in ("accelerate launch --multi_gpu --num_processes 4", "torchrun --nproc_per_node 2", "python")
    first = [word.split(",")[0].replace("range(5)", "0") for word in shlex.split(words.removeprefix("-m "))]
    assert enter(*first, "dry_run=true" if launcher != "python" else "--cfg=job") == 0
    assert capsys.readouterr().out


def labels(output: str) -> list[str]:
    """Return the first words of what a run prints: not of the line with its `run_id`, nor of indented ones."""
    return [line.split()[0] for line in output.splitlines()[1:] if line and not line.startswith(" ")]


def test_what_is_done_with_a_run_afterwards(
    enter: Enter, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, export = tmp_path / "results", tmp_path / "export"
    assert enter(*shrink("python -m wlora.run task=rte method=wlora", data, results)) == 0
    expected = next(block for block in blocks(README, "") if "metric " in block)
    assert labels(capsys.readouterr().out) == labels(expected)
    (record,) = records_in(results)
    assert len(AFTERWARDS) == 3
    for line in AFTERWARDS:
        words = [word for word in shlex.split(line.replace("RUN_ID", record.run_id)) if not word.startswith("results_dir=")]
        words = [word.replace("to=DIR", f"to={export}") for word in words] + [f"results_dir={results}"]
        if words[2] == "wlora.run":
            assert enter(*words[3:]) == 0
        else:
            exports.main(words[3:])
    assert (results / "reruns" / "records" / f"{record.run_id}.json").is_file() and (export / "model.safetensors").is_file()


@pytest.mark.parametrize("line", in_tiers(PREDICTIONS))
def test_predictions_are_made(line: str, enter: Enter, data: Path, tmp_path: Path) -> None:
    own = "split=" not in line
    trained = next(run for run in RUNS if "task=text_classification" in run) if own else "python -m wlora.run task=rte"
    assert enter(*shrink(trained, data, tmp_path / "results")) == 0
    (record,) = records_in(tmp_path / "results")
    words = shlex.split(line.replace("RUN_ID", record.run_id).replace("DATA", str(data)))[3:]
    predictions.main([*words, f"results_dir={tmp_path / 'results'}"])
    written = tmp_path / ("labelled.csv" if own else "glue/RTE.tsv")
    assert written.read_text(encoding="utf-8").splitlines()[0] == (
        "id,text,prediction,probability" if own else "index\tprediction"
    )


@pytest.mark.parametrize(("right", "wrong"), [("rank=4", "rnk=4"), ("task=rte", "task=rtee"), ("method=", "metod=")])
def test_a_mistyped_command_would_fail(right: str, wrong: str, enter: Enter, data: Path, tmp_path: Path) -> None:
    line = next(line for line in RUNS if right in line)
    assert enter(*shrink(line.replace(right, wrong), data, tmp_path)) == 2
    assert not records_in(tmp_path)


def test_completion_can_be_installed(enter: Enter, capsys: pytest.CaptureFixture[str]) -> None:
    for line in COMPLETION:
        match = re.fullmatch(r'eval "\$\(wlora (.*)\)"', line)
        assert match, line
        assert enter(*match[1].split()) == 0
        script = capsys.readouterr().out
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0 and "complete" in script


def in_this_process(enter: Enter) -> Callable[..., Any]:
    """Stand in for `subprocess.run` of `python -m wlora.run`: no start of a process per run."""
    start = subprocess.run

    def stand_in(words: list[str], **options: Any) -> Any:
        if words[1:3] != ["-m", "wlora.run"]:
            return start(words, **options)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = enter(*words[3:])
        return subprocess.CompletedProcess(words, code, out.getvalue(), stderr="")

    return stand_in


def run_script(line: str, data: Path, *options: str) -> str:
    """Run a script as `python` would; returns what it prints."""
    words = shlex.split(line.replace("DATA", str(data)))[1:]
    sys.argv = [str(ROOT / words[0]), *words[1:], *options]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(sys.argv[0], run_name="__main__")
    return out.getvalue()


@pytest.mark.parametrize("line", in_tiers(TABLES))
def test_tables_are_made_and_committed_ones_are_those(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)[3:]
    (folder,) = [word.partition("=")[2] for word in words if word.startswith("results_dir=")] or ["results"]
    committed = ROOT / folder
    (tmp_path / folder).mkdir(parents=True)
    if committed.is_dir() and folder != "results":
        shutil.copytree(committed, tmp_path / folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tables"))
    monkeypatch.chdir(tmp_path)
    tables.main(words)
    made = tmp_path / folder / "tables"
    assert list(made.glob("*.md"))
    if (committed / "tables").is_dir() and folder != "results/paper":
        names = {file.name for file in made.iterdir()}
        assert names <= {file.name for file in (committed / "tables").iterdir()}
        assert all((made / name).read_bytes() == (committed / "tables" / name).read_bytes() for name in names)


@pytest.mark.slow
def test_figures_are_drawn_from_committed_records(tmp_path: Path) -> None:
    drawn: dict[str, set[str]] = {}
    for line in FIGURES:
        _, _, module, *words = shlex.split(line)
        (folder,) = (word.partition("=")[2] for word in words if word.startswith("results_dir="))
        if module == "wlora.figures":
            copy = tmp_path / folder
            shutil.copytree(ROOT / folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("figures", "tables"))
            figures.main([word if "results_dir" not in word else f"results_dir={copy}" for word in words])
            drawn[folder] = {file.name for file in (copy / "figures").iterdir()}
        elif module == "wlora.memory":
            memory.main([*words, "model=tiny_bert", "task.batch_size=2", f"results_dir={tmp_path / 'small'}"])
            assert list((tmp_path / "small" / "memory").glob("tiny_bert*.json"))
        else:
            assert module == "wlora.report"  # tests/cli/test_report.py writes it
    assert drawn["results/cpu_study"] >= {f"{name}.png" for name in ("adapters", "pareto", "curves", "selection")}
    assert drawn["results/selection"] == {"selection.png", "selection.pdf"}


@pytest.mark.parametrize("line", in_tiers(STUDIES))
def test_table_scripts_are_there_and_list_their_cells(line: str, tmp_path: Path) -> None:
    *settings, script = shlex.split(line)
    assert os.access(ROOT / script, os.X_OK)
    env = {**os.environ, **dict(word.split("=", 1) for word in settings), "DRY": "1", "TASKS": "rte sst2"}
    env |= {"RESULTS": str(tmp_path), "METHODS": "wlora", "PYTHONPATH": str(ROOT)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env.pop("DATA", None)
    done = subprocess.run(["bash", str(ROOT / script)], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0 and " runs done; " in done.stdout, done.stderr


@pytest.mark.slow
def test_the_comparison_of_whole_runs_with_peft_runs_once(
    enter: Enter, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = (line for line in SCRIPTS if " end_to_end " in line)
    started: list[list[str]] = []
    here = in_this_process(enter)

    def start(words: list[str], **options: Any) -> Any:
        started.append(words)
        # The warm-up of 20 steps and the selection need as many epochs of so few rows. PEFT's runs do not.
        few = ["1" if before == "--epochs" else word for before, word in zip(["", *words], words, strict=False)]
        return here(few, **options)

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.syspath_prepend(ROOT / "scripts")  # as Python does for a script
    contenders = importlib.import_module("benchmark_runs").RUNS
    for name in set(contenders) - {"LoRA", "WLoRA", "WLoRA, prefix, fast"}:
        monkeypatch.delitem(contenders, name)
    small = ["--tasks", "mrpc", "--seeds", "0", "--epochs", "24", "--out", str(tmp_path / "out")]
    printed = run_script(line, data, *small)
    rows = {row["what"]: row for row in json.loads((tmp_path / "out" / "end_to_end.json").read_text())["rows"]}
    forms = ("grouped", "random", "padded")
    for form in forms:
        peft = rows.pop(f"PEFT + Trainer, {form}")
        assert peft[f"time_to_{form}"] == 1 and peft["trained"] == rows["LoRA"]["trained"] > rows["WLoRA"]["trained"]
    assert all(row[f"time_to_{form}"] > 0 for row in rows.values() for form in forms)
    assert [heading for heading in printed.split(" | ") if heading.startswith("time_to_")] == [f"time_to_{f}" for f in forms]
    assert len(rows) == 3 and all(f"| {name} |" in printed and row["peak_mib"] for name, row in rows.items())
    assert run_script(line, data, *small) == printed
    assert len(list((tmp_path / "out" / "runs" / "records").glob("*.json"))) == len(rows)
    baselines = [words for words in started if len(words) > 1 and str(words[1]).endswith("peft_baseline.py")]
    assert [words[words.index("--batches") + 1] for words in baselines] == list(forms)


def test_every_script_is_run_here_or_in_test_benchmark() -> None:
    assert {shlex.split(line)[1] for line in SCRIPTS} == {"scripts/benchmark.py"}


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for block in blocks(PAGES["docs/python.md"], "python"):
        exec(block, space)
        if "plain" not in space and "trainer" in space:
            assert len(block.splitlines()) <= 40 and len(space["handle"].summary()["adapters"]) == 2
        elif "plain" in space and "record" not in space:
            assert len(block.splitlines()) <= 25 and space["handle"].events[0].kind == "cut"
    assert space["record"].status == "success" and space["logits"].shape == (1, 3)
