"""What the tokenizer of a model puts between the texts of a pair. `test_loading.py` has the tokenizer's errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from tests.conftest import compose
from tests.support.llama_folder import build_llama_folder
from wlora.config.identity import run_id, scientific_fields
from wlora.models.source import locate
from wlora.models.tokenizer import load_tokenizer, separates_pairs


def test_the_texts_of_a_pair_are_separated_if_the_tokenizer_does_not_do_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SmolLM2's, GPT-2's and Qwen's, the tokenizer adds no special token."""
    folder = build_llama_folder(tmp_path / "bare")
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bare.post_processor = processors.ByteLevel(trim_offsets=True)
    bare.save(str(folder / "tokenizer.json"))
    found = {}
    for kind, name in (("joined", "bare"), ("separated", "bare"), ("own", "own")):
        if name == "own":
            folder = build_llama_folder(tmp_path / name)  # it puts its begin token before each of the two
        words = (f"model.path={folder}", f"model.separate_pairs={str(kind != 'joined').lower()}")
        config = compose("task=story_nli", "model=tiny_llama", *words)
        tokenizer = load_tokenizer(config.model, locate(config.model))
        pair, first, second = (tokenizer(*texts)["input_ids"] for texts in (("a tree", "is"), ("a tree",), ("is",)))
        found[kind] = pair
        expected = {"joined": [*first, *second], "separated": [*first, tokenizer.eos_token_id, *second], "own": pair}
        assert pair == expected[kind], kind
        assert separates_pairs(tokenizer) == (kind != "joined")
        cut = tokenizer("a tree", "is", truncation=True, max_length=len(pair) - 1)["input_ids"]
        assert len(cut) == len(pair) - 1
    own = build_llama_folder(tmp_path / "again")
    same = compose("task=story_nli", "model=tiny_llama", f"model.path={own}", "model.separate_pairs=false").model
    assert load_tokenizer(same, locate(same))("a tree", "is")["input_ids"] == found["own"]


@pytest.mark.parametrize(("task", "changes"), [("sst2", False), ("mrpc", True)])
def test_separated_pairs_are_part_of_the_identity_of_tasks_with_pairs(task: str, changes: bool) -> None:
    def identity(value: str) -> str:
        config = compose(f"task={task}", "model=tiny_llama", f"model.separate_pairs={value}")
        return run_id(scientific_fields(config, task_data="d", model_data="m", precision="fp32"))

    assert (identity("true") != identity("false")) == changes
