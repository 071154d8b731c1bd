"""Whatever is written on the command line is either understood or refused in one or two lines, without a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from wlora.cli import run
from wlora.config.rules import RULES
from wlora.config.schema import config_folder

METHODS = {file.stem: OmegaConf.load(file) for file in sorted((config_folder() / "method").glob("*.yaml"))}
GROUPS = ("task", "model", "experiment")
CHOICES = [(group, f.stem) for group in GROUPS for f in sorted((config_folder() / group).glob("*.yaml"))]
KEYS = sorted(RULES) + [f"method.{key}" for content in METHODS.values() for key in content.get("allowed", {})]
STRANGE = ["task.path", "model.path", "model.gguf_file", "task.columns", "train", "hydra.run.dir", "per_task", "no.such.key"]
VALUES = ["0", "1", "3", "-1", "0.5", "1e-3", "1e400", "nan", "null", "true", "''", "text", "[1,2]", "{a: 1}", "${rank}"]
VALUES += ["${x}", "2147483648", "é", "a=b", "qkv", "tuned", "authors", "/no/such/folder", "[", "}", "\\", "1,2", "???"]

overrides = st.one_of(
    st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)),
    st.tuples(st.sampled_from(STRANGE), st.sampled_from(VALUES)),
    st.sampled_from([*CHOICES, *((group, "none") for group in GROUPS)]),
    st.tuples(st.sampled_from(KEYS), st.text(max_size=8)),
).map("=".join)
prefixes = st.sampled_from(["", "+", "++", "~"])
lines = st.tuples(st.sampled_from(sorted(METHODS)).map("method={}".format), st.lists(overrides, max_size=3), prefixes)


def check(
    line: tuple[str, list[str], str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    method, words, prefix = line
    if words:
        words = [prefix + words[0], *words[1:]]
    start = ["task=story_nli", "model=tiny_bert", method, *words, "dry_run=true", "offline=true", f"results_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["run", *start])
    monkeypatch.chdir(tmp_path)  # hydra.run.dir is among the keys, and is made
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run.main()
    out, error = capfd.readouterr()
    assert end.value.code in (0, 2), (words, error)
    assert "Traceback" not in out + error, words
    if end.value.code:
        assert 1 <= len(error.splitlines()) <= 2 and error.startswith("error: "), (words, error)
    else:
        assert "adapter parameters" in out or "trainable" in out, (words, out)
    assert not (tmp_path / "records").exists()


FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # no shrinking: the lines are short as they are
    suppress_health_check=list(HealthCheck),
)


@settings(FUZZ, max_examples=30)
@given(line=lines)
def test_an_override_is_understood_or_refused_in_a_line_or_two(
    line: tuple[str, list[str], str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check(line, capfd, monkeypatch, tmp_path)


@pytest.mark.slow
@settings(FUZZ, max_examples=150)
@given(line=lines)
def test_many_overrides_are_understood_or_refused(
    line: tuple[str, list[str], str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check(line, capfd, monkeypatch, tmp_path)
