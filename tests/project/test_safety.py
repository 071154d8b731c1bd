"""No way leads to pickle, to code from a repository, or to evaluating text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = sorted([*(ROOT / "wlora").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "instantiate"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
READERS = {"load", "loads", "Unpickler", "open", "read_pickle", "UnsafeLoader", "FullLoader", "unsafe_load", "full_load"}


def offences(source: str) -> list[str]:
    """Return what a source text does that could run somebody else's code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES | {"torch", "yaml"}:
            # Under another name the call itself would not be seen.
            found += [alias.name for alias in node.names if alias.name in READERS]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        module, _, function = name.rpartition(".")
        if name in FORBIDDEN or function == "instantiate" or (module in PICKLES and function in READERS):
            found.append(name)
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
            found.append(f"{name} with allow_pickle")
        if name.startswith("yaml.") and function in READERS:
            found.append(name)
        if function == "read_pickle" or (module == "torch.hub" and function == "load"):
            found.append(name)
        if keywords.get("trust_remote_code", "False") != "False":
            found.append("trust_remote_code")
        if keywords.get("shell", "False") != "False":
            found.append("shell=True")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_what_it_reads(path: Path) -> None:
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(stream)",
        "pickle.loads(data)",
        "eval(text)",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "from pickle import load",
        "from torch import load as read",
        "from yaml import UnsafeLoader",
        "pandas.read_pickle(path)",
        "torch.hub.load(name, entry)",
        "hydra.utils.instantiate(config)",
    ],
)
def test_the_search_would_find(line: str) -> None:
    assert offences(line)
