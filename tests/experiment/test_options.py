"""Switches of the commands for trained runs are true or false, in any letter case; anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from wlora.errors import ConfigError
from wlora.experiment import export, predict, push, verify_export
from wlora.experiment.export import read_options

COMMANDS: dict[str, tuple[Callable[[list[str]], Any], list[str], list[str]]] = {
    "export": (export.export, ["0123"], ["offline", "compact"]),
    "predict": (predict.predict, ["0123", "new.csv"], ["offline"]),
    "verify-export": (verify_export.verify, ["folder"], ["offline"]),
    "push": (push.push, ["0123", "a/b"], ["private", "compact"]),
}


@pytest.mark.parametrize(("command", "key"), [(name, key) for name in COMMANDS for key in COMMANDS[name][2]])
@pytest.mark.parametrize("value", ["yes", "1", "Treu"])
def test_a_switch_is_true_or_false(command: str, key: str, value: str) -> None:
    act, words, _ = COMMANDS[command]
    with pytest.raises(ConfigError) as caught:
        act([*words, f"{key}={value}"])
    assert str(caught.value) == f"{key}={value}: allowed is true | false"


def test_a_switch_may_be_in_any_letter_case() -> None:
    for options in (export.OPTIONS, predict.OPTIONS, verify_export.OPTIONS):
        for value in ("True", "TRUE", "true"):
            assert read_options(["x", f"offline={value}"], options)[1]["offline"] == "true"
        assert read_options(["x", "offline=FALSE"], options)[1]["offline"] == "false"
    with pytest.raises(ConfigError, match="compact=true: allowed is false with format=merged"):
        export.export(["0123", "compact=True", "format=merged"])
