"""No network: refused within seconds and before torch, with the ways out; a filled cache is used as it is."""

from __future__ import annotations

import http.client
import http.server
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from tests.conftest import ROOT, compose
from wlora.data import hub
from wlora.errors import ConfigError

# `python -c` in place of `-m`, so that something is left to look at sys.modules once main has ended.
WRAPPER = """
import sys
import wlora.data.hub as hub
from wlora.cli.run import main
hub.PROBE_SECONDS = 120  # a server of the test may be slow on a busy machine
sys.argv = ["wlora", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    code = end.code
print(f"{code} torch={'torch' in sys.modules}")
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAPER = ("task=rte", "method=wlora_plus", "rank=4")


def wrapped(home: Path, *words: str, **environment: str) -> tuple[str, list[str]]:
    """Run the entry point with an empty cache and a hub that refuses connections: (verdict, error lines)."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    env = clean | {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", **environment}
    done = subprocess.run(
        [sys.executable, "-c", WRAPPER, *words], capture_output=True, text=True, env=env, cwd=home, timeout=300
    )
    return done.stdout.strip(), done.stderr.strip().splitlines()


@pytest.mark.parametrize(
    ("words", "environment", "reason"),
    [
        ((), {}, "no network"),
        ((), {"HF_HUB_OFFLINE": "1"}, "offline"),
        ((), {"TRANSFORMERS_OFFLINE": "1"}, "offline"),
        (("offline=true",), {}, "offline"),
    ],
)
def test_nothing_reachable_and_nothing_cached_is_refused_at_once(
    words: tuple[str, ...], environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    verdict, errors = wrapped(tmp_path, *PAPER, *words, **environment)
    assert verdict == "2 torch=False"
    assert len(errors) == 2 and errors[0].startswith(f"error: {reason}, and not in the local cache: ")
    assert "microsoft/deberta-v3-base" in errors[0] and "nyu-mll/glue" in errors[0]
    assert all(way in errors[1] for way in ("task.path=DIR", "cache (HF_HOME)", "experiment=demo"))
    assert not list(tmp_path.rglob("*.json")), "nothing was recorded"


def test_only_what_is_missing_is_named(tmp_path: Path) -> None:
    verdict, errors = wrapped(tmp_path, *PAPER, "model=tiny_bert")
    assert verdict == "2 torch=False"
    assert "task=rte" in errors[0] and "deberta" not in errors[0]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("task.path={}",), "task.path={}"),
        (("model.path={}",), "model.path={}"),
        (("adapter.path={}",), "adapter.path={}"),
        (("model=llama3_8b", "model.path={}", "model.gguf_file=none.gguf"), "model.path={}"),
    ],
)
def test_a_path_that_does_not_exist_is_told_before_what_the_hub_lacks(
    words: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    absent = str(tmp_path / "absent")
    verdict, errors = wrapped(tmp_path, *PAPER, *(word.format(absent) for word in words), "offline=true")
    assert verdict == "2 torch=False"
    assert len(errors) <= 2 and named.format(absent) in errors[0] and "local cache" not in errors[0]


def test_a_file_that_is_missing_beside_a_model_that_is_not_at_hand_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("sentence1,sentence2,label\na,b,0\n")
    verdict, errors = wrapped(tmp_path, *PAPER, f"task.path={tmp_path / 'data'}", "offline=true")
    assert verdict == "2 torch=False"
    assert errors[0].startswith(f"error: task.path={tmp_path / 'data'}: no file for the split validation")


# In this process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point the hub's libraries at an empty cache, and put back whatever going offline changes."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, "")  # set first, so that monkeypatch restores what go_offline writes
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield tmp_path


def cache_model(home: Path, revision: str = "main") -> None:
    """Lay out what the hub's library leaves behind after a download of the model."""
    repository = home / "hub" / "models--microsoft--deberta-v3-base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")


def cache_dataset(home: Path, subset: str = "rte") -> None:
    """Lay out what the datasets library leaves behind once it has prepared a subset."""
    (home / "datasets" / "nyu-mll___glue" / subset / "0.0.0" / COMMIT).mkdir(parents=True)


def test_a_filled_cache_passes_without_network_and_keeps_the_libraries_off_it(cache: Path) -> None:
    cache_model(cache)
    cache_dataset(cache)
    hub.require_sources(compose(*PAPER))
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
    assert constants.is_offline_mode() and datasets.config.HF_HUB_OFFLINE


def test_a_filled_cache_passes_with_offline_and_the_hub_is_not_asked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_reachable", lambda: pytest.fail("the network was touched"))
    cache_model(cache)
    cache_dataset(cache)
    hub.require_sources(compose(*PAPER, "offline=true"))
    assert constants.is_offline_mode()


def test_the_datasets_cache_may_be_elsewhere(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_model(cache)
    cache_dataset(cache / "elsewhere")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "elsewhere" / "datasets"))
    hub.require_sources(compose(*PAPER))


def missing(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        hub.require_sources(compose(*PAPER, *overrides))
    return str(caught.value).splitlines()[0]


def test_half_a_cache_is_not_enough_and_the_other_half_is_named(cache: Path) -> None:
    cache_model(cache)
    assert "task=rte (nyu-mll/glue)" in missing() and "deberta" not in missing()
    assert not constants.is_offline_mode()


def test_another_revision_or_subset_does_not_count(cache: Path) -> None:
    cache_model(cache)
    cache_dataset(cache, "mrpc")
    card = cache / "hub" / "datasets--nyu-mll--glue"
    (card / "refs").mkdir(parents=True)
    (card / "refs" / "main").write_text(COMMIT)
    (card / "snapshots" / COMMIT).mkdir(parents=True)
    (card / "snapshots" / COMMIT / "README.md").write_text("The card came with mrpc; rte's rows did not.")
    assert "task=rte" in missing()
    assert "model=deberta_v3_base" in missing("model.revision=v2")


def test_local_and_generated_sources_ask_for_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_reachable", lambda: pytest.fail("the network was touched"))
    hub.require_sources(compose("task=story_nli", "model=tiny_bert"))
    hub.require_sources(compose("experiment=demo"))
    hub.require_sources(compose("task=rte", f"task.path={tmp_path}", "model=tiny_bert"))
    assert not constants.is_offline_mode()


def test_a_look_up_that_hangs_counts_as_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The timeout of a connection does not cover the look-up of its name.
    given_up = threading.Event()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: given_up.wait(600))
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.3)
    assert "no network" in missing(), "the answer did not wait for the look-up, which is still on"
    given_up.set()


def test_the_wait_for_an_answer_leaves_room_within_five_seconds() -> None:
    assert hub.PROBE_SECONDS <= 3.5


@pytest.mark.parametrize(
    ("answer", "reachable"),
    [
        (None, True),
        (urllib.error.HTTPError("http://hub", 403, "Forbidden", http.client.HTTPMessage(), None), True),
        (urllib.error.URLError("no route"), False),
        (TimeoutError(), False),
        (http.client.BadStatusLine("what"), False),
        (ValueError("unknown url type"), False),
    ],
)
def test_any_answer_of_the_hub_counts_and_no_failure_is_loud(
    answer: Exception | None, reachable: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def urlopen(*_: Any, **__: Any) -> None:
        if answer is not None:
            raise answer

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert hub._reachable() is reachable
    assert capfd.readouterr().err == ""


def test_with_the_hub_in_reach_nothing_is_changed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_reachable", lambda: True)
    hub.require_sources(compose(*PAPER))
    assert not constants.is_offline_mode() and "HF_HUB_OFFLINE" not in os.environ


# A gated repository --------------------------------------------------------------------------------------------------

LLAMA = ("task=story_nli", "model=llama3_8b", "method=lora")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A local server in the hub's place, which lets a token `good` in and answers all others that the model is gated."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            gated = "resolve" in self.path and self.headers.get("Authorization") != "Bearer good"
            seen.append(self.path)
            self.send_response((403 if self.headers.get("Authorization") else 401) if gated else 404)
            if gated:
                self.send_header("X-Error-Code", "GatedRepo")
                self.send_header("X-Error-Message", "Access to model meta-llama/Meta-Llama-3-8B is restricted.")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: Any) -> None:
            pass

    seen: list[str] = []
    monkeypatch.setattr(hub, "PROBE_SECONDS", 120)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("token", ["", "of-someone-without-access"])
def test_a_gated_model_without_access_gets_its_one_line(token: str, stand_in: Any, tmp_path: Path) -> None:
    address, seen = stand_in
    verdict, errors = wrapped(tmp_path, *LLAMA, HF_ENDPOINT=address, HF_TOKEN=token)
    assert verdict == "2 torch=False"
    assert errors == [
        "error: model=llama3_8b: meta-llama/Meta-Llama-3-8B is gated: accept its licence on the repository's page and set "
        "HF_TOKEN or run `hf auth login`, or give a local copy as model.path=DIR"
    ]
    assert "/meta-llama/Meta-Llama-3-8B/resolve/main/config.json" in seen
    assert not list(tmp_path.rglob("records"))


def test_a_token_with_access_passes(stand_in: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, seen = stand_in
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "good")
    hub.require_sources(compose(*LLAMA))
    assert any("config.json" in path for path in seen)
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(ConfigError, match="is gated"):
        hub.require_sources(compose(*LLAMA))


def test_a_gguf_file_of_a_repository_is_what_is_asked_for(
    stand_in: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, seen = stand_in
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "good")
    hub.require_sources(compose(*LLAMA, "model.gguf_file=q4.gguf", "model.revision=v1"))
    assert any(path.endswith("/resolve/v1/q4.gguf") for path in seen)


def test_a_cached_model_is_not_asked_about(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_model(cache)
    monkeypatch.setattr(hub, "_reachable", lambda: True)
    monkeypatch.setattr(hub, "_refuse_gated", lambda source: pytest.fail("the hub was asked"))
    hub.require_sources(compose(*PAPER))
