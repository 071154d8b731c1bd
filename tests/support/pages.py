"""The README and the pages of docs/, and the code blocks in them."""

from __future__ import annotations

import re

from tests.conftest import ROOT

FILES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in FILES}
README = PAGES["README.md"]


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page that are in a language; "" stands for none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]
