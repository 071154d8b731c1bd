"""The command line: what a user types and reads."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY
from wlora import __version__
from wlora.cli import command, entry
from wlora.cli.command import COMMANDS
from wlora.cli.job import OUTCOMES, Outcome, Sweep
from wlora.console import protect_output
from wlora.experiment import dry_run

# Lines that are answered without torch: what is looked at, and mistakes with what is said of each.
LOOKS = [["--help"], ["method=rlora", "--help"], ["--cfg", "job"]]
NO_NETWORK = ["task=rte", "method=wlora_plus", "rank=4"]
MISTAKES = [
    (["task=rtee"], "did you mean task=rte?"),
    (["method=wlorra"], "did you mean method=wlora?"),
    (["model=minilmm"], "did you mean model=minilm?"),
    (["rnak=4"], "did you mean rank?"),
    (["method.lr_omga=1"], "did you mean method.lr_omega?"),
    (["task.epoch=1"], "did you mean task.epochs?"),
    (["rank=0"], "rank=0: allowed is int >= 1"),
    (["rank=four"], "rank=four: allowed is int >= 1"),
    (["k=0"], "k=0: allowed is int >= 1"),
    (["model.quantization=fp4"], "model.quantization=fp4: allowed is none | nf4 | int8"),
    (["experiment=table3", "task=story_nli"], "task=story_nli: allowed is mnli, sst2, cola, qqp, qnli, rte, mrpc, stsb"),
    (["k=37"], "k=37: allowed is 1 to 36"),
    (["train.fsdp=true"], "train.fsdp=true method=wlora: allowed is method=lora"),
    (
        ["train.fsdp=true", "method=lora", "model.quantization=nf4"],
        "model.quantization=nf4: allowed is none with train.fsdp",
    ),
    (["lr=-1e-3"], "lr=-0.001: allowed is float > 0"),
    (["seed=-1"], "seed=-1: allowed is int >= 0"),
    (["dropout=1"], "dropout=1.0: allowed is float >= 0, < 1"),
    (["targets=qk"], "targets=qk: allowed is qkv | attention | all | release"),
    (["targets=qkv@"], "targets=qkv@: allowed is qkv | attention | all | release | SET@LAYER"),
    (["targets=qkv@12"], "targets=qkv@12: allowed is a layer from 0 to 11 of model=deberta_v3_base"),
    (["precision=fp8"], "precision=fp8: allowed is auto"),
    (["task.epochs=x"], "task.epochs=x: allowed is float > 0"),
    (["method=rlora", "method.draw=never"], "method.draw=never: allowed is at_projection | at_start"),
    (["method.lr_omega=abc"], "method.lr_omega=abc: allowed is float > 0"),
    (["method.prest=authors"], "did you mean method.preset?"),
    (["method=adalora", "method.preset=author"], "method.preset=author: allowed is authors or null with method=adalora"),
    (["method=full", "method.preset=authors"], "method.preset=authors: allowed is null with method=full"),
    (["method=adalora", "task=story_nli", "method.preset=authors"], "task=story_nli: allowed is task=cola,mnli,mrpc,"),
    (["task.preset=nonsense"], "task.preset=nonsense: allowed is null with task=rte"),
    (["task.prest=release"], "did you mean task.preset?"),
    (["method=adalora", "method.preset=authors", "method.every=0"], "method.every=0: allowed is int >= 1 or null"),
    (["+foo=1"], "foo is unknown"),
    (["rank=[1"], "error:"),
    (["results_dir=/dev/null/x"], "results_dir=/dev/null/x: allowed is a folder that can be written"),
    (["model.path=nowhere"], "model.path=nowhere: allowed is a folder with config.json"),
    (["model=tiny_bert", "task.path=nowhere"], "task.path=nowhere"),
]
# One fresh process for all of them.
PROBE = """
import contextlib, io, json, sys
from wlora.cli import run
found = []
for words in json.loads(sys.argv[1]):
    sys.argv, code = ["run", *words], None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            run.main()
        except SystemExit as end:
            code = end.code or 0
    found.append((out.getvalue(), "torch" in sys.modules, errors.getvalue().splitlines(), code))
print(json.dumps(found))
"""
Answer = tuple[str, bool, list[str], int]
"""What is printed, whether torch was imported by then, the lines of errors, and the exit code."""


@pytest.fixture(scope="module")
def probed() -> dict[str, Answer]:
    """Enter every line in one fresh process; returns the answers by line."""
    lines = [*LOOKS, NO_NETWORK, *(words for words, _ in MISTAKES)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(lines)], capture_output=True, text=True, env=env, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {" ".join(words): answer for words, answer in zip(lines, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("words", LOOKS)
def test_help_and_the_composed_configuration_need_no_torch(words: list[str], probed: dict[str, Answer]) -> None:
    out, torch, errors, code = probed[" ".join(words)]
    assert (torch, code, errors) == (False, 0, []) and "rank" in out


@pytest.mark.parametrize(("words", "expected"), MISTAKES)
def test_mistakes_are_told_in_two_lines_with_exit_code_2(words: list[str], expected: str, probed: dict[str, Answer]) -> None:
    _, torch, errors, code = probed[" ".join(words)]
    assert (torch, code) == (False, 2)
    assert len(errors) <= 2 and errors[0].startswith("error: ") and expected in "\n".join(errors)


def test_no_network_is_refused_at_once_with_the_ways_out(probed: dict[str, Answer]) -> None:
    _, torch, errors, code = probed[" ".join(NO_NETWORK)]
    assert (torch, code, len(errors)) == (False, 2, 2)
    assert all(way in "\n".join(errors) for way in ("task.path", "cache", "experiment=demo"))


@pytest.fixture
def unforeseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the estimate of memory, most of a dry run's time; tests/experiment/test_memory_estimate.py makes it."""

    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(dry_run, "estimate", fail)


@pytest.mark.parametrize(
    ("words", "trainable"),
    [
        ([], "221,184 adapter parameters"),
        (["targets=all"], "663,552"),
        (["targets=release"], "479,232 adapter parameters (0.260%"),
    ],
)
def test_dry_run_counts_the_paper_model_offline_and_writes_nothing(
    words: list[str], trainable: str, unforeseen: None, tmp_path: Path, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "results"
    words = ["task=rte", "method=wlora_plus", "rank=4", "dry_run=true", f"results_dir={folder}", *words]
    code, printed, errors = run_main(*words)
    assert code == 0, errors
    assert trainable in printed and "no record yet" in printed and not folder.exists()


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["task=xsum", "model=bart_large", "targets=all"],
            ["192 of method=lora", "1.065% of 406,291,456, 1.053% including the adapters"],
        ),
        (["experiment=table5", "task=cnn_dailymail", "rank=1"], ["192 of method=lora", "0.133% including the adapters"]),
        (
            ["experiment=table3", "task=sst2", "model.quantization=nf4"],
            ["224 of method=lora", "0.522% of 4,015,271,936 stored", "128 (67,349 rows", "batch 32 × 2), warm-up 25"],
        ),
        (
            ["experiment=table3_fsdp", "task=sst2", "precision=bf16"],
            ["sharded    15.0 GB of frozen base: 7.5 on each of 2, 3.8 on each of 4, 1.9 on each of 8 processes"],
        ),
        (["experiment=table4", "task=squad_v2"], ["60 of method=lora", "at least 61095 (130,319 rows"]),
    ],
)
def test_dry_run_has_the_papers_n_and_percentages_of_the_other_tables(
    words: list[str], lines: list[str], unforeseen: None, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    code, printed, errors = run_main(*words, "method=lora", "dry_run=true")
    assert code == 0 and errors == "" and all(line in printed for line in lines), printed


def test_a_sweep_trains_every_cell_once_and_a_failing_cell_does_not_stop_it(
    tmp_path: Path, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    words = ["-m", *TINY, "method=lora,probe", "seed=0,1", f"results_dir={tmp_path}"]
    code, printed, errors = run_main(*words)
    assert code == 0, errors
    assert len(list((tmp_path / "records").glob("*.json"))) == 4 and printed.count("success") == 4
    assert run_main(*words)[1].count("is done") == 4
    code, printed, _ = run_main("-m", *TINY, "method=lora", "seed=-1,0", f"results_dir={tmp_path}")
    assert code == 2 and "ConfigError" in printed and "is done" in printed


def test_a_sweep_says_which_run_is_which_and_repeats_no_notice(
    tmp_path: Path, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    words = ["-m", *TINY, "method=lora,probe", "lr=1e-3,2e-3", f"results_dir={tmp_path}"]
    _, printed, _ = run_main(*words)
    labels = [f"lr={lr} method={method}" for lr in ("0.001", "0.002") for method in ("lora", "probe")]
    headings = [line.partition(" (about ") for line in printed.splitlines() if line.startswith("run ")]
    assert [line for line, *_ in headings] == [f"run {i} of 4: {label}" for i, label in enumerate(labels, start=1)]
    assert [bool(about) for _, about, _ in headings] == [False, True, True, True]
    summary = printed.partition("\nsweep:\n")[2].splitlines()
    assert [line.split() for line in summary] == [
        [str(i), *label.split(), "success", line.split()[-1]]
        for i, (label, line) in enumerate(zip(labels, summary, strict=True), start=1)
    ]
    assert printed.count("notice: warm-up shortened") == 1
    # Skipped runs say nothing of the time that the others take.
    assert "left)" not in run_main(*words)[1]


def test_the_time_left_comes_from_runs_that_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(frozenset({"lr"}), total=12)
    monkeypatch.setattr(OUTCOMES, "command", True)
    monkeypatch.setattr(OUTCOMES, "outcomes", [Outcome("", "success", 0.5, 0), Outcome("", "ConfigError", None, 2)])
    assert sweep.label(["lr=1", "seed=0", "++lr=2"]) == "lr=1 lr=2"
    assert sweep.heading(3, "lr=1") == "run 3 of 12: lr=1"
    OUTCOMES.outcomes += [Outcome("", "success", 0.5, 0, seconds=seconds) for seconds in (60, 120)]
    assert sweep.heading(5, "lr=1") == "run 5 of 12: lr=1 (about 12 min left)"
    monkeypatch.setattr(OUTCOMES, "command", False)
    assert sweep.heading(5, "lr=1") == "run 5 of 12: lr=1", "a launcher's process does not know what the others do"
    assert Sweep(frozenset()).heading(5, "") == "run 5", "a sweeper that decides on the way"


def test_a_sweep_names_what_an_experiment_brings_along(
    unforeseen: None, tmp_path: Path, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    words = ["-m", "experiment=table1", *TINY, "dry_run=true", f"results_dir={tmp_path}"]
    _, printed, _ = run_main(*words[:-2], "seed=0,1", *words[-2:])
    assert "run 2 of 2: seed=1\n" in printed, "TINY's lr takes the place of the grid"
    _, printed, _ = run_main("-m", "experiment=table1", *TINY[:-1], "dry_run=true", f"results_dir={tmp_path}")
    assert "run 3 of 3: lr=0.005\n" in printed
    _, printed, _ = run_main("-m", *TINY, "dry_run=true", "seed=3,3", "hydra.sweeper.max_batch_size=1")
    assert [line.split() for line in printed.partition("\nsweep:\n")[2].splitlines()] == [
        ["1", "seed=3", "described"],
        ["2", "seed=3", "described"],
    ]
    assert "run 2: seed=3\n" in printed, "in batches nobody knows how many"


def test_a_bug_ends_with_a_traceback_and_a_record_that_says_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import compose
    from wlora.experiment import run as experiment

    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(experiment.Trainer, "begin", bug)
    with pytest.raises(ZeroDivisionError):
        experiment.run(compose(*TINY, f"results_dir={tmp_path}"))
    (file,) = (tmp_path / "records").glob("*.json")
    content = json.loads(file.read_text())
    assert content["status"] == "failed" and "planted" in content["error"]


# What is printed ------------------------------------------------------------------------------------------------------


def test_a_character_that_cannot_be_shown_is_replaced_and_a_closed_pipe_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", os.fdopen(writer, "w"))
    protect_output()
    once = sys.stdout
    protect_output()
    assert sys.stdout is once
    print("1 → 2", flush=True)
    for _ in range(2):
        print("nobody reads this", file=sys.stderr, flush=True)
    sys.stderr.close()
    assert shown.getvalue() == b"1 ? 2\n"


def test_a_process_without_streams_can_print(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    protect_output()
    print("nothing", flush=True)
    assert not sys.stderr.isatty()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_entry_point_protects_its_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Protected(Exception):
        pass

    def protect() -> None:
        raise Protected

    module = importlib.import_module(COMMANDS[name][0])
    monkeypatch.setattr(module if name == "run" else entry, "protect_output", protect)
    monkeypatch.setattr(sys, "argv", ["wlora", "--help"])
    with pytest.raises(Protected):
        module.main()


def test_every_command_has_a_help_that_names_it_and_needs_no_torch() -> None:
    code = """if True:
    import sys
    from wlora.cli.command import COMMANDS, main
    for name in sorted(COMMANDS, key="memory".__eq__):
        sys.argv = ["wlora", name, "--help"]
        try:
            main()
        except SystemExit as end:
            assert not end.code, name
        assert name == "memory" or "torch" not in sys.modules, name
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(re.search(f"wlora[. ]{name}", done.stdout) for name in COMMANDS)


def test_the_command_wlora(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def say(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wlora", *words])
        try:
            command.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    assert say("--version") == (0, f"wlora {__version__}\n", "")
    code, out, _ = say()
    assert code == 2 and out == say("--help")[1] and all(name in out for name in COMMANDS)
    code, _, err = say("tabels", "all")
    assert code == 2 and err.startswith("error: tabels") and "tables" in err
    code, _, err = say("tables", "7")
    assert code == 2 and "7" in err
    code, _, err = say("methd=lora")
    assert code == 2 and "method" in err


def test_a_run_whose_output_nobody_reads_ends_well(tmp_path: Path) -> None:
    tiny = [*TINY, "method=lora", "train.max_steps=2", "train.save_model=true", f"results_dir={tmp_path}"]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "wlora.run", *tiny]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=os.environ | settings | ascii_only, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"") and len(list((tmp_path / "models").iterdir())) == 1
