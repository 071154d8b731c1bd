"""Configurations of adapters that would keep PEFT busy for ever, or fill the memory: refused by every reader at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wlora.adapters.peft_format import fingerprint, refuse_unbounded
from wlora.errors import ConfigError

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a.b"], "modules_to_save": ["c"]}
ENDLESS = "(a+)+" * 20 + "$"
BAD = [
    *({"r": value} for value in (0, -1, True, 2.0, "2", 10**9, [2])),
    *({"lora_alpha": value} for value in (0, -1, True, "4", 10**400, float("nan"), float("inf"), float("-inf"), [4])),
    *({"rank_pattern": {"a.b": value}} for value in (0, True, 10**9, None)),
    *({"alpha_pattern": {"a.b": value}} for value in (0, -1, float("nan"), 10**400, None)),
    *({key: {ENDLESS: 1}} for key in ("rank_pattern", "alpha_pattern")),
    *({key: {"x" * 400: 1}} for key in ("rank_pattern", "alpha_pattern")),
    *({key: {f"a{number}": 1 for number in range(20_000)}} for key in ("rank_pattern", "alpha_pattern")),
    *({key: value} for key in ("rank_pattern", "alpha_pattern") for value in ([1], "a", 5)),
    *({"modules_to_save": value} for value in (5, "c", [5], [""], {"c": 1})),
]
# What only PEFT reads, in an export.
UNREAD: list[dict[str, Any]] = [
    *({"target_modules": value} for value in (ENDLESS, 5, [5], {"a": 1})),
    *({key: ENDLESS} for key in ("exclude_modules", "layers_pattern")),
    {"layers_to_transform": [1]},
    *({key: {".*" * 20 + "x": 1}} for key in ("rank_pattern", "alpha_pattern")),
    *({key: 10**9} for key in ("init_r", "target_r")),
]


def write(folder: Path, config: dict[str, Any]) -> None:
    """Write a folder of adapters whose tensors nobody looks at."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"")


def check(folder: Path) -> None:
    """Check a folder's configuration as an export does."""
    refuse_unbounded((folder / "adapter_config.json").read_bytes(), str(folder))


@pytest.mark.parametrize("change", BAD, ids=lambda change: str(change)[:40])
def test_an_unbounded_configuration_is_refused_by_every_reader(change: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert fingerprint(str(tmp_path))
    check(tmp_path)
    write(tmp_path, GOOD | change)
    (key,) = change
    for read in (lambda: fingerprint(str(tmp_path)), lambda: check(tmp_path)):
        with pytest.raises(ConfigError, match=f"{tmp_path}: {key} is .*: allowed is ") as refused:
            read()
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize("change", UNREAD, ids=lambda change: str(change)[:40])
def test_an_export_refuses_what_only_peft_would_read(change: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, GOOD | change)
    (key,) = change
    with pytest.raises(ConfigError, match=f"{tmp_path}: {key} is .*: allowed is "):
        check(tmp_path)
