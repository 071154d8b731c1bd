"""The shape of the package: rooms in one order, none of which imports from one above it; short functions and modules."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up: a module imports from its own room and from those before it.
ROOMS = (
    *("errors", "distributed", "console", "reading", "metrics", "config", "storage", "data", "tasks", "models"),
    *("adapters", "methods", "training", "analysis", "experiment", "integration", "cli"),
)
ENTRIES = ("__init__", "__main__", "run", "tables", "figures", "report", "export", "predict", "memory", "sweep")
SOURCES = sorted([*(ROOT / "wlora").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
LONGEST_FUNCTION, LONGEST_MODULE = 60, 400


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(file: Path) -> set[str]:
    """Return the modules of the package that a file names, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name == "wlora" or name.startswith("wlora.")}


def test_every_module_is_in_a_known_room() -> None:
    top = {path.stem for path in (ROOT / "wlora").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert top == {*ROOMS, *ENTRIES} and len(ROOMS) <= 20


def test_no_room_imports_from_one_above_it() -> None:
    above = []
    for file in (ROOT / "wlora").rglob("*.py"):
        room = file.relative_to(ROOT / "wlora").parts[0].removesuffix(".py")
        if room in ROOMS:
            others = {room_of(name) for name in imports(file)} & set(ROOMS)
            above += [f"{file.relative_to(ROOT)} -> {other}" for other in others if ROOMS.index(other) > ROOMS.index(room)]
    assert not above


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in (ROOT / "wlora").rglob("*.py")}
    names = {name.removesuffix(".__init__") for name in files.values()}
    edges = {name: (imports(file) & names) - {name} for file, name in files.items() if not name.endswith("__init__")}
    while leaves := [name for name, others in edges.items() if not others & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, f"circles among {sorted(edges)}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_functions_and_modules_are_short(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= LONGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, node.name


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_test_modules_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_MODULE


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    bounds = re.findall(r'"([a-z][\w-]*)>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    pinned = dict(re.findall(r"^([a-z][\w-]*)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    padded = {name: [*version.split("."), "0", "0"][:3] for name, version in pinned.items()}
    differing = [name for name, least in bounds if name in padded and [*least.split("."), "0", "0"][:3] != padded[name]]
    assert not differing
    (needed,) = re.findall(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r'"([a-z][\w-]*)>=', needed)) <= set(pinned)
