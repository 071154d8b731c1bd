"""`wlora push`: what the hub receives is the export with its card; refusals are one or two lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.support.hub_server import Hub, serve_hub
from wlora.cli.push import main
from wlora.errors import ConfigError, RunFault
from wlora.experiment.export import export
from wlora.experiment.push import push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", served.token)
        yield served


def test_the_hub_receives_the_export_with_its_card(
    hub: Hub, run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run_tiny("method=lora")
    main([record.run_id, "someone/story-lora", f"results_dir={tmp_path}", "private=true"])
    assert capsys.readouterr().out.strip().endswith(f"{hub.address}/someone/story-lora")
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("someone", "story-lora")
    assert created.get("private") is True or created.get("visibility") == "private"
    exported = export([record.run_id, f"results_dir={tmp_path}"])
    expected = {f"someone/story-lora/{file.name}": file.read_bytes() for file in exported.iterdir()}
    assert hub.files == expected and f"Run `{record.run_id}`" in hub.files["someone/story-lora/README.md"].decode()
    push([record.run_id, "someone/whole", f"results_dir={tmp_path}", "format=merged"])
    assert "someone/whole/model.safetensors" in hub.files and not (tmp_path / "exports" / f"{record.run_id}-merged").exists()


def test_what_the_hub_or_a_word_refuses_is_told_in_a_line_or_two(
    hub: Hub, run_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_tiny("method=lora")
    there = f"results_dir={tmp_path}"

    def refused(kind: type[Exception], *words: str) -> str:
        with pytest.raises(kind) as caught:
            push([*words, there])
        assert str(caught.value).count("\n") < 2
        return str(caught.value)

    assert "allowed is RUN_ID owner/name" in refused(ConfigError, record.run_id)
    assert "allowed is RUN_ID owner/name" in refused(ConfigError, record.run_id, "no-owner")
    assert "privat is unknown; did you mean private?" in refused(ConfigError, record.run_id, "a/b", "privat=true")
    assert "private=yes: allowed is true | false" in refused(ConfigError, record.run_id, "a/b", "private=yes")
    probe = run_tiny("method=probe")
    assert "has saved no adapters" in refused(ConfigError, probe.run_id, "a/b")
    assert hub.created == [] and hub.files == {}
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert "the hub answers 401" in (told := refused(RunFault, record.run_id, "a/b")) and "hf auth login" in told
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached (OfflineModeIsEnabled" in refused(RunFault, record.run_id, "a/b")
