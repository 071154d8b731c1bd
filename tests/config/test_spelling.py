"""The words of the command line: what was meant by a wrong one, and which keys a run does not read."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import ROOT, TINY
from tests.support.conf_files import read_method
from wlora.cli.sweep import _compose
from wlora.config.schema import config_folder
from wlora.config.spelling import _IDLE, SHORT, Idle, check_read, find_keys

# Wrong lines, and what the answer says.
MEANT = {
    "epochs=2": "epochs is unknown; did you mean task.epochs?",
    "batch_size=16": "did you mean task.batch_size?",
    "max_length=64": "did you mean task.max_length?",
    "max_steps=10": "did you mean train.max_steps?",
    "task.max_steps=10": "did you mean train.max_steps?",
    "train.lr=1e-3": "did you mean lr?",
    "learning_rate=1e-3": "did you mean lr?",
    "weight_decay=0": "did you mean train.weight_decay?",
    "warmup_steps=3": "did you mean warmup?",
    "num_epochs=3": "did you mean task.epochs?",
    "num_train_epochs=3": "did you mean task.epochs?",
    "K=3": "did you mean k?",
    "method.K=3": "did you mean k?",
    "T=30": "did you mean method.select_steps?",
    "r=8": "did you mean rank?",
    "lora_rank=8": "did you mean rank?",
    "lora_alpha=8": "did you mean alpha?",
    "lora_dropout=0.1": "did you mean dropout?",
    "model_name=x": "did you mean model?",
    "output_dir=x": "did you mean results_dir?",
    "path=x": "did you mean adapter.path or model.path or task.path?",
    "lr_omga=3": "did you mean method.lr_omega?",
    "+epochs=2": "did you mean task.epochs?",
    "-m epochs=1,2": "did you mean task.epochs?",
    "method=lora T=30": "T is unknown; method.select_steps is a key of method=rlora,",
    "-m method=lora,adalora method.every=3": "method.every is a key of method=adalora,dynamic_lora,increlora, not of",
    "method=lora,wlora": "add -m, as in python -m wlora.run -m method=lora,wlora",
    "lr=1e-3,1e-4": "add -m, as in python -m wlora.run -m lr=1e-3,1e-4",
    "'seed=range(3)'": "add -m, as in python -m wlora.run -m 'seed=range(3)'",
    "--lr 1e-3": "--lr 1e-3: keys have no dashes; write lr=1e-3",
    "--lr=1e-3": "--lr=1e-3: keys have no dashes; write lr=1e-3",
    "task=rte --learning-rate 1e-3": "write lr=1e-3",
    "--dry-run task=rte": "--dry-run: keys have no dashes; write dry_run=true",
    "lr 1e-3": "lr 1e-3: write lr=1e-3",
    "lr = 1e-3": "lr = 1e-3: write lr=1e-3, without spaces",
    "lr=1e-3, 1e-4": "lr=1e-3, 1e-4: write lr=1e-3,1e-4, without spaces",
    "k:3": "k:3: write k=3",
    "demo": "demo: write experiment=demo",
    "task=rte -m method=lora": "method=lora: flags such as -m must come before or after all keys, not between them",
    "--cfg all_of_it": "invalid choice: 'all_of_it'",
    "~method": "allowed is method=NAME",
    "~method.name": "allowed is method=NAME",
    "~adapter": "~adapter: allowed is adapter=VALUE",
    "-m hydra.launcher._target_=nope seed=0,1": "Invalid plugin 'nope'",
    "-m hydra.launcher._target_=.. seed=0,1": "cannot be composed",
    "-m hydra.sweeper._target_=nope seed=0,1": "Invalid plugin 'nope'",
    "model.architecture.model_type=[1]": "model.architecture.model_type=[1] is unknown",
    "model.architecture.num_hidden_layers=99999999999": "num_hidden_layers=99999999999: allowed is int >= 1, <= 10000",
    "model.architecture.num_hidden_layers=x": "num_hidden_layers=x: allowed is int >= 1",
    "model=tiny_bert model.architecture.max_position_embeddings=x": "max_position_embeddings=x: allowed is int >= 1",
    "model.source=Net": "model.source=Net: allowed is hub | package | random",
    "task=story_nli model=minilm model.package=a.b": "model.package=a.b: allowed is the name of a package",
    "'lr=${method}' '+method.x=${lr}'": "Interpolation to parent node detected",
}  # fmt: skip

# All of them in one fresh process, which tells whether torch was imported.
ASK = """
import contextlib, io, json, shlex, sys
from wlora.cli import run
told = {}
for line in json.load(sys.stdin):
    sys.argv = ["run", *shlex.split(line)]
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            run.main()
        except SystemExit as end:
            told[line] = [end.code, out.getvalue(), errors.getvalue()]
print(json.dumps({"told": told, "torch": "torch" in sys.modules}))
"""


def ask(lines: list[str]) -> tuple[dict[str, tuple[int, str, str]], bool]:
    """Return (exit code, output, errors) of each line, and whether torch was imported for any of them."""
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=300,
    )
    answer = json.loads(done.stdout)
    return {line: tuple(told) for line, told in answer["told"].items()}, answer["torch"]


@pytest.fixture(scope="module")
def answers() -> tuple[dict[str, tuple[int, str, str]], bool]:
    return ask(list(MEANT))


@pytest.mark.parametrize("line", MEANT)
def test_a_wrong_word_is_answered_with_the_one_that_was_meant(
    line: str, answers: tuple[dict[str, tuple[int, str, str]], bool]
) -> None:
    code, out, errors = answers[0][line]
    assert code == 2 and out == "" and errors.startswith("error: ")
    assert MEANT[line] in errors and len(errors.splitlines()) <= 2, shlex.split(line)


def test_wrong_words_are_answered_before_torch_is_imported(
    answers: tuple[dict[str, tuple[int, str, str]], bool],
) -> None:
    assert answers[1] is False


def test_a_short_key_stands_for_all_of_its_name() -> None:
    assert find_keys("rank") == find_keys("method.Rank") == ["rank"]
    assert find_keys("no_such") == []


def read_by(*runs: str) -> list[str]:
    """Check the runs of a command, each with its words in a line."""
    return check_read([shlex.split(line) for line in runs], _compose)


def test_the_short_keys_are_those_that_methods_interpolate() -> None:
    files = (config_folder() / "method").glob("*.yaml")
    assert set(SHORT) == {key for file in files for key in re.findall(r": \$\{(\w+)\}", file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("rule", _IDLE, ids=lambda rule: f"{rule.method} {rule.own}")
def test_a_rule_of_unread_keys_names_keys_of_its_method(rule: Idle) -> None:
    keys = {f"method.{key}" for key in read_method(rule.method)}
    assert f"method.{rule.own}" in keys and set(rule.keys) <= keys | set(SHORT)
    assert not rule.holds(read_method(rule.method)[rule.own]), "the default reads everything"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("method=lora k=3", "k=3: k is not read by method=lora"),
        ("method=full rank=4", "rank=4: rank is not read by method=full"),
        ("method=probe targets=all", "targets=all: targets is not read by method=probe"),
        ("method=vera rank=4", "rank=4: rank is not read by method=vera"),
        ("experiment=table1 method=full rank=4", "rank=4: rank is not read by method=full"),
        ("method=wlora_plus method.schedule=halvings k=3", "k is not read by method=wlora_plus method.schedule=halvings"),
        ("method=wlora_plus method.preset=authors k=3", "k is not read by method=wlora_plus method.schedule=halvings"),
        ("method=rlora method.draw=at_start method.select_steps=9", "not read by method=rlora method.draw=at_start"),
        ("method=lora_drop method.threshold=0.9 method.keep=0.5", "not read by method=lora_drop method.threshold=0.9"),
        ("-m method=lora,full k=1,2", "k=1: k is not read by method=lora, method=full"),
    ],
)
def test_a_key_that_no_run_reads_is_refused(line: str, said: str, run_main: Callable[..., tuple[int, str, str]]) -> None:
    code, out, errors = run_main(*line.split(), "dry_run=true")
    assert (code, out) == (2, "") and said in errors and errors.endswith("way out: remove it; it has no effect\n")


@pytest.mark.parametrize(
    "line",
    [
        "method=lora rank=4 alpha=8 dropout=0 targets=all",
        "method=milora rank=4",  # alpha follows it
        "method=vera method.rank=${rank} rank=4",
        "method=wlora_plus k=3",
        "method=rlora method.draw=at_start k=3",
        "method=lora ++k=3",
        "experiment=table1 method=full",  # what an experiment sets is not the user's word
        "method=adalora method.preset=authors task=rte",
    ],
)
def test_keys_that_are_read_or_not_the_users_are_not_told(line: str) -> None:
    assert read_by(line) == []


def test_a_key_that_some_runs_of_a_sweep_read_is_told_once(run_main: Callable[..., tuple[int, str, str]]) -> None:
    code, out, errors = run_main("-m", *TINY, "method=lora,wlora,full", "k=1,2", "rank=4", "dry_run=true")
    assert (code, errors) == (0, "")
    assert out.count("notice: k is not read by method=lora, method=full\n") == 1
    assert out.count("notice: rank is not read by method=full\n") == 1 and out.count("is not read") == 2
