"""Every `run_id` that is in use stays as it is: of configurations of all kinds, and of all committed records.

`identities.json` maps the words of a command line to its `run_id`. A version that changes numbers on purpose changes the
identities concerned there, in the same commit, and says why.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, compose
from wlora.config.identity import run_id, scientific_fields
from wlora.config.schema import config_folder, restore_config

PINNED: dict[str, str] = json.loads((Path(__file__).parent / "identities.json").read_text())


@pytest.mark.parametrize("words", PINNED)
def test_run_id_of_a_configuration_stays(words: str) -> None:
    fields = scientific_fields(compose(*words.split()), task_data=None, model_data=None, precision="fp32")
    assert run_id(fields) == PINNED[words]


@pytest.mark.parametrize("group", ["method", "task", "model", "experiment"])
def test_every_choice_of_a_group_is_pinned(group: str) -> None:
    named = {word.partition("=")[2] for words in PINNED for word in words.split() if word.startswith(f"{group}=")}
    assert {file.stem for file in (config_folder() / group).glob("*.yaml")} <= named


def test_run_ids_of_all_committed_records_follow_from_their_configurations() -> None:
    files = sorted(ROOT.glob("results/**/records/*.json"))
    assert len(files) > 500
    for file in files:
        content = json.loads(file.read_text())
        fields = scientific_fields(
            restore_config(content["config"]),
            task_data=content["task"]["data"],
            model_data=content["model"]["fingerprint"],
            precision=content["environment"]["precision"],
        )
        assert run_id(fields) == content["run_id"] == file.stem, file
