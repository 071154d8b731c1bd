"""GGUF files: what their head says, the model and tokenizer they hold, what is refused, and the layer on packed weights."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import TINY, RunMain, compose, enter_main
from tests.support.llama_folder import BOS, EOS, LAYERS, WORDS, build_llama_folder, llama_weights, write_gguf
from wlora.adapters.adapter_set import AdapterSet
from wlora.adapters.layer import LowRankAdapter
from wlora.errors import ConfigError
from wlora.methods.milora import decompose_base
from wlora.models.architectures import read_architecture
from wlora.models.gguf import read_gguf_architecture
from wlora.models.loading import load_model
from wlora.models.quantization import count_model
from wlora.models.source import READS_GGUF, locate
from wlora.models.targets import Target, count_targets
from wlora.models.tokenizer import load_tokenizer

pytest.importorskip("transformers", minversion=READS_GGUF)
FILE = "model.Q8_0.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GGUF file and nothing else."""
    made = tmp_path_factory.mktemp("gguf")
    write_gguf(made / FILE)
    return made


def words(folder: Path, file: str = FILE) -> list[str]:
    return ["model=smollm2_135m", f"model.path={folder}", f"model.gguf_file={file}"]


def load(folder: Path, file: str = FILE) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = compose(*words(folder, file), "k=1")
    source = locate(config.model)
    tokenizer = load_tokenizer(config.model, source)
    model = load_model(config.model, source, tokenizer, head="sequence_classification", num_labels=2, seed=0)
    return model, tokenizer


# The head of the file ------------------------------------------------------------------------------------------------


def test_the_head_names_the_shape_of_the_model(folder: Path) -> None:
    assert read_gguf_architecture(folder / FILE) == {
        "model_type": "llama",
        "vocab_size": WORDS,
        "num_hidden_layers": LAYERS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = compose(*words(folder), "targets=all")
    assert count_targets(read_architecture(config.model), "all") == 7 * LAYERS
    assert config.k == 5, "of the file's 14 linears, not of SmolLM2's 210"


def test_a_dry_run_counts_from_the_head_without_reading_weights(folder: Path, run_main: RunMain) -> None:
    code, out, error = run_main(*words(folder), *TINY[:1], "targets=all", "method=lora", "rank=1", "dry_run=true")
    # Per layer: 2·64 for q and o, 64 + 32 for k and v, 64 + 128 for each of the three feed-forward linears.
    assert code == 0 and f"{2 * (2 * 128 + 2 * 96 + 3 * 192):,} adapter parameters" in out, error
    assert error == ""


@pytest.mark.parametrize("content", [b"", b"GGUF", b"nonsense" * 10, b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)])
def test_a_file_that_is_not_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="not a GGUF file of version 2 or 3, or truncated"):
        compose(*words(tmp_path))


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_a_head_cut_short_is_refused(share: float, folder: Path, tmp_path: Path) -> None:
    content = (folder / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: int(len(content) * share)])
    if share == 0.02:
        with pytest.raises(ConfigError, match="or truncated"):
            compose(*words(tmp_path))
    else:  # the head is whole, the weights are not
        with pytest.raises(ConfigError, match="cannot be loaded"):
            load(tmp_path)


def test_a_file_of_another_family_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / FILE, architecture="qwen2")
    with pytest.raises(ConfigError, match="family qwen2: allowed is llama"):
        compose(*words(tmp_path))


def test_a_file_needs_no_model_of_its_family(tmp_path: Path) -> None:
    write_gguf(tmp_path / FILE)
    model = compose("model=tiny_bert", f"model.path={tmp_path}", f"model.gguf_file={FILE}").model
    assert model.name == tmp_path.name and model.architecture["model_type"] == "llama"


def test_a_missing_file_is_refused_and_those_there_are_named(folder: Path, run_main: RunMain) -> None:
    code, _, error = run_main(*words(folder, "model.Q4.gguf"), *TINY[:1])
    assert code == 2 and f"there: {FILE}" in error and len(error.splitlines()) <= 2


def test_a_package_or_random_model_has_no_gguf_file() -> None:
    with pytest.raises(ConfigError, match="model.gguf_file=x.gguf: allowed is null for model=tiny_llama without model.path"):
        compose("model=tiny_llama", "model.gguf_file=x.gguf")


def test_a_gguf_file_is_not_quantised_again(folder: Path) -> None:
    with pytest.raises(ConfigError, match="model.quantization=nf4: allowed is none with model.gguf_file"):
        compose(*words(folder), "model.quantization=nf4")


def test_without_the_package_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert enter_main(monkeypatch, *words(folder), "task=story_nli") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: model.gguf_file={FILE}: the package gguf is not installed",
        "way out: pip install 'wlora[quantization]'",
    ]


def test_transformers_must_be_new_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.22.1")
    assert enter_main(monkeypatch, *words(folder), "task=story_nli") == 2
    told = f"error: model.gguf_file={FILE}: needs transformers {READS_GGUF} or newer, not 5.22.1"
    assert capsys.readouterr().err.splitlines() == [told]


# Weights and tokenizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F32"])
def test_the_weights_are_those_of_the_blocks_in_float32(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / FILE, kind=kind)
    model, _ = load(tmp_path)
    parameters = dict(model.named_parameters())
    for name, weight in llama_weights().items():
        if name == "lm_head.weight":
            continue
        expected = weight.float().numpy()
        if expected.ndim == 2:
            blocks = gguf.quantize(expected, gguf.GGMLQuantizationType[kind])
            expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        # Queries and keys were written in llama.cpp's order of rows and must be back in that of the rotary embedding.
        assert parameters[name].dtype == torch.float32
        assert np.allclose(parameters[name].numpy(), expected, atol=1e-6), name


def test_the_files_own_tokenizer_cuts_as_the_one_it_was_made_from(folder: Path, tmp_path: Path) -> None:
    _, tokenizer = load(folder)
    original = build_llama_folder(tmp_path / "llama")
    config = compose("model=llama3_8b", f"model.path={original}", "k=1").model
    reference = load_tokenizer(config, locate(config))
    text = "Anna went to the library. Ben grabbed the ball."
    assert tokenizer(text)["input_ids"] == reference(text, add_special_tokens=False)["input_ids"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, EOS)


def test_the_tokenizer_has_no_token_that_the_model_has_not(folder: Path) -> None:
    model, tokenizer = load(folder)
    assert len(tokenizer) == WORDS == model.get_input_embeddings().weight.shape[0]
    ids = tokenizer("Anna <|endoftext|>", padding=True)["input_ids"]
    assert max(ids) < WORDS and "token_type_ids" not in tokenizer("Anna")
    assert tokenizer.eos_token_id == 1 and 1 not in tokenizer(f"Anna {EOS}")["input_ids"], "in a text it is plain text"


def test_a_file_that_asks_for_a_first_token_gets_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / FILE, add_bos=True)
    _, tokenizer = load(tmp_path)
    assert tokenizer("Anna left.")["input_ids"][0] == 0 and len(tokenizer) == WORDS


def test_what_lies_beside_the_file_has_no_part_in_the_model(tmp_path: Path) -> None:
    folder = build_llama_folder(tmp_path / "llama")
    write_gguf(folder / FILE)
    (folder / "config.json").write_text("nonsense")
    model, tokenizer = load(folder)
    assert model.config.num_hidden_layers == LAYERS
    assert tokenizer("Anna")["input_ids"][0] != 0, "the tokenizer.json there puts a token before every text"
    assert (tokenizer.bos_token, tokenizer.pad_token) == (BOS, EOS)


def test_the_identity_is_the_content_of_the_file_and_not_its_place(folder: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    (tmp_path / "other.gguf").write_bytes(b"not read")
    (tmp_path / "tokenizer.json").write_bytes(b"not read")
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    here, there = (locate(compose(*words(path)).model).fingerprint for path in (folder, tmp_path))
    assert here == there and len(str(here)) == 16
    write_gguf(tmp_path / FILE, kind="Q4_1")
    assert locate(compose(*words(tmp_path)).model).fingerprint != here


def test_a_run_from_a_gguf_file_ends_in_success(folder: Path, run_tiny: Any, capfd: pytest.CaptureFixture[str]) -> None:
    record = run_tiny(*words(folder), "method=wlora", "targets=all", "train.max_steps=16", "rank=4")
    assert record.status == "success" and 1 <= len(record.adapters) <= 5
    # transformers unpacks the blocks of this family: as many elements lie in memory as the architecture has.
    assert record.parameters["stored"] == record.parameters["total"]
    assert capfd.readouterr().err == ""


# The layer on packed weights -----------------------------------------------------------------------------------------


def packed_linear(weight: torch.Tensor) -> nn.Module:
    """Return transformers' linear over Q8_0 blocks, which it uses for families other than Llama's."""
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0
    linear = utils.GgufLinear(weight.shape[1], weight.shape[0], int(kind))
    linear.weight.data = torch.from_numpy(gguf.quantize(weight.numpy(), kind).copy())
    return linear


def test_the_layer_works_on_packed_blocks_as_on_the_unpacked_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    model = nn.ModuleDict({"packed": packed_linear(weight), "plain": nn.Linear(64, 96, bias=False)})
    kind = gguf.GGMLQuantizationType.Q8_0
    model["plain"].weight.data = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    model.requires_grad_(False)
    assert count_model(model["packed"], without=set()) == (96 * 64, 96 * 64 // 32 * 34)
    adapters = AdapterSet(model)
    for index, name in enumerate(("packed", "plain")):
        torch.manual_seed(1)
        adapter = adapters.attach(
            Target(name, index, "linear"), lambda d_in, d_out, device: LowRankAdapter(d_in, d_out, rank=4, scale=1.0)
        )
        nn.init.normal_(adapter.B)
    found = []
    for name in ("packed", "plain"):
        x = torch.linspace(-1, 1, 16 * 64).reshape(16, 64).requires_grad_()
        out = model[name](x)
        out.square().sum().backward()
        assert x.grad is not None and adapters[name].A.grad is not None
        found.append([out.detach(), x.grad, adapters[name].A.grad, adapters[name].B.grad])
    for packed, plain in zip(*found, strict=True):
        assert torch.allclose(packed, plain, rtol=1e-4, atol=1e-3)
    with pytest.raises(TypeError, match="packed: an adapter can be merged into a floating-point weight only"):
        adapters.fold("packed")
    with pytest.raises(ConfigError, match="cannot be decomposed"):
        decompose_base("packed", model.get_submodule("packed.base"), method="milora")
    adapters.disconnect("packed")
    assert type(model["packed"]).__name__ == "GgufLinear"
