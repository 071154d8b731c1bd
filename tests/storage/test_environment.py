"""The commit that a record names: that of the checkout with the package, and whether the package was changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

ASK = """
from wlora.storage.environment import describe_environment
environment = describe_environment("cpu", "fp32", 1)
print(environment["git_commit"], environment["git_dirty"])
"""


def git(folder: Path, *words: str) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *settings, *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def asked(folder: Path) -> list[str]:
    out = subprocess.run([sys.executable, "-c", ASK], cwd=folder, capture_output=True, text=True, check=True).stdout
    return out.split()


def test_a_record_names_the_commit_of_its_checkout(tmp_path: Path) -> None:
    source = tmp_path / "checkout"
    shutil.copytree(ROOT / "wlora", source / "wlora", ignore=shutil.ignore_patterns("__pycache__"))
    assert asked(source) == ["None", "None"]
    git(source, "init", "--quiet")
    git(source, "add", ".")
    git(source, "commit", "--quiet", "--message", "first")
    (source / "notes.txt").write_text("not part of the package")
    commit = git(source, "rev-parse", "HEAD")
    assert asked(source) == [commit, "False"]
    with (source / "wlora" / "errors.py").open("a") as file:
        file.write("# changed\n")
    assert asked(source) == [commit, "True"]


def test_a_package_inside_another_checkout_names_no_commit(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "wlora", tmp_path / "site-packages" / "wlora", ignore=shutil.ignore_patterns("__pycache__"))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "of another project")
    assert asked(tmp_path / "site-packages") == ["None", "None"]
