"""README and docs say what is true: scores stand in committed tables, links lead somewhere, the tree is the real one."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import subprocess

import pytest

from tests.conftest import ROOT
from tests.support.pages import FILES, PAGES, README, blocks
from wlora.config.schema import config_folder
from wlora.storage.records import Record


def test_every_score_that_is_shown_stands_in_a_committed_table() -> None:
    made = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "results").glob("*/tables/*.md"))
    shown = [score for page in PAGES.values() for score in re.findall(r"0\.\d{4} ± 0\.\d{4}", page)]
    assert len(shown) > 50 and [score for score in shown if score not in made] == []


def test_the_study_that_is_shown_is_the_committed_one() -> None:
    section = PAGES["docs/studies.md"].split("## CPU study", 1)[1]
    stretches = itertools.groupby(section.splitlines(), lambda line: line.startswith("| "))
    shown = ["\n".join(lines) for is_table, lines in stretches if is_table]
    made = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "results" / "cpu_study" / "tables").glob("*.md"))
    assert shown and all(table in made for table in shown)
    differences = re.findall(r"[+−]\d+\.\d\d \[[^\]]*\]", section)
    assert differences and [text for text in differences if text not in made] == []


def tree(page: str) -> set[str]:
    """Return the paths in a page's tree; a folder ends in `/`."""
    (block,) = (block for block in blocks(page, "") if block.startswith("conf/"))
    found, parents = set(), [""]
    for line in block.splitlines():
        match = re.fullmatch(r"( *)(\S+) +(\S.*)", line)
        assert match, f"a path and what it is: {line}"
        depth = len(match[1]) // 2
        path = parents[depth] + match[2]
        parents[depth + 1 :] = [path]
        found.add(path)
    return found


def files_of_the_project() -> list[str]:
    """List the files of the checkout, or of an unpacked sdist those of its main folders."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return [name for name in listed if (ROOT / name).is_file()]
    folders = ("conf", "scripts", "tests", "wlora")
    return [file.relative_to(ROOT).as_posix() for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]


def test_the_tree_is_complete() -> None:
    listed = tree(PAGES["docs/tree.md"])
    for name in files_of_the_project():
        folder, _, rest = name.partition("/")
        if rest:
            assert any(entry.startswith(f"{folder}/") for entry in listed), f"{folder}/ is not in docs/tree.md"
        if re.fullmatch(r"(wlora|scripts)/.*\.py", name) and not name.endswith("__init__.py"):
            assert name in listed, f"{name} is not in docs/tree.md"
        if re.fullmatch(r"conf/\w+/.*", name):
            assert name.rpartition("/")[0] + "/" in listed


@pytest.mark.parametrize("page", ["README.md", "docs/tree.md"])
def test_the_tree_lists_nothing_that_is_not_there(page: str) -> None:
    made_later = {"results/"}
    missing = [path for path in tree(PAGES[page]) - made_later if not (ROOT / path).exists()]
    # An sdist has no continuous integration.
    assert [path for path in missing if not path.startswith(".")] == []


def first_cells(page: str) -> list[str]:
    """Return the first cells of a page's tables that hold names in backticks."""
    return re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE)


def test_methods_and_record_keys_are_the_real_ones() -> None:
    methods = {file.stem for file in (config_folder() / "method").glob("*.yaml")}
    (table,) = re.findall(r"^\| `method=` .*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"^\| `(\w+)` \| [A-Z]", table, re.MULTILINE)) == methods
    keys = {key for cell in first_cells(PAGES["docs/records.md"]) for key in re.findall(r"`(\w+)`", cell)}
    assert keys == {f.name for f in dataclasses.fields(Record)}


@pytest.mark.parametrize(("page", "group"), [("tasks", "task"), ("models", "model"), ("sweeps", "hydra/launcher")])
def test_every_choice_is_described(page: str, group: str) -> None:
    cells = first_cells(PAGES[f"docs/{page}.md"])
    described = {name.rpartition("=")[2] for cell in cells for name in re.findall(r"`([^`]*)`", cell)}
    assert {file.stem for file in (config_folder() / group).glob("*.yaml")} - described == set()


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_files_and_headings() -> None:
    more = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")]
    for file in [*FILES, *more]:
        for link in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", file.read_text(encoding="utf-8")):
            target, _, anchor = "".join(link).partition("#")
            if target.startswith("https://") or (
                target.startswith("results/") and not (ROOT / "results" / "selection").is_dir()
            ):
                continue  # an sdist has no results
            there = file.parent / target if target else file
            assert there.is_file(), f"{file.name}: {target}"
            assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), f"{file.name}: {target}#{anchor}"


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.splitlines()) <= 200
    assert [name for name in PAGES if name != "README.md" and f"({name})" not in README] == []


def test_the_citation_names_the_paper_and_no_second_version() -> None:
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["preferred-citation"]["title"] in README
    assert "version" not in citation, "the version stands in wlora/__init__.py alone"
