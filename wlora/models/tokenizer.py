"""Load a model's tokenizer, and let it read special tokens as text, fit the model's heads, and separate pairs of texts."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from wlora.config.schema import ModelConfig
from wlora.errors import ConfigError
from wlora.models.architectures import read_architecture
from wlora.models.gguf import read_gguf_architecture
from wlora.models.loading import origin_of, quiet, reason_of
from wlora.models.source import ModelSource, unchanged
from wlora.models.targets import find_layout

# The special token that heads read, and its position. The heads of decoders read the last token of the text instead.
_READ_AT = {"first": ("cls_token", 0, "before"), "end": ("eos_token", -1, "behind")}


def load_tokenizer(model: ModelConfig, source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; for a GGUF file, from the file itself. `trust_remote_code` is never set.

    Special tokens that occur in a text are read as plain text. A tokenizer without a padding token, such as Llama's, pads
    with its end-of-sequence token. This is safe: padding is masked, and no encoded text ends with that token, so that
    classification heads find the last token that is not padding.

    Raises:
        ConfigError: there is no tokenizer; it cannot be read; it has neither of the two tokens; or it does not add the
            special token that the model's heads read.
    """
    if source.location is None:
        from wlora.models.tiny import build_tokenizer

        tiny = build_tokenizer()
        _read_marks_as_text(tiny)
        return tiny
    with unchanged(model, source):
        try:
            with quiet():
                tokenizer: PreTrainedTokenizerBase = (
                    _read_gguf_tokenizer(model, source.location)
                    if model.gguf_file
                    else AutoTokenizer.from_pretrained(source.location, revision=model.revision)
                )
        except Exception as error:  # three libraries raise exceptions without a common class
            raise ConfigError(f"{origin_of(model)}: the tokenizer cannot be loaded ({reason_of(error)})") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # Without vocabulary files, transformers builds a tokenizer for which every word is unknown.
        raise ConfigError(f"{origin_of(model)}: there is no tokenizer (tokenizer.json, spm.model or vocab.txt)")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"{origin_of(model)}: the tokenizer has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    _read_marks_as_text(tokenizer)
    _fit_tokenizer(tokenizer, model)
    if model.separate_pairs and not separates_pairs(tokenizer) and tokenizer.is_fast and tokenizer.eos_token is not None:
        _separate_pairs(tokenizer, tokenizer.eos_token)
    return tokenizer


def separates_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a tokenizer puts a special token between two texts. The tokenizers of many decoders do not."""
    single, pair = (tokenizer.num_special_tokens_to_add(pair=both) for both in (False, True))
    return bool(pair > single)


def _separate_pairs(tokenizer: Any, mark: str) -> None:
    """Put a special token between the two texts of a pair; single texts are encoded as before."""
    backend = tokenizer.backend_tokenizer
    number = tokenizer.convert_tokens_to_ids(mark)
    between = processors.TemplateProcessing(single="$A", pair=f"$A {mark} $B", special_tokens=[(mark, number)])
    before = [backend.post_processor] if backend.post_processor else []
    backend.post_processor = processors.Sequence([*before, between])


def _fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> None:
    """Check that a tokenizer adds the token that the model's heads read, and remove outputs that the model does not accept.

    The tokenizer of a discovered decoder is set to pad on the right, because positions are counted from the left.

    Raises:
        ConfigError: the token that the heads read is missing.
    """
    architecture = read_architecture(model)
    layout = find_layout(architecture)
    if layout.reads in _READ_AT:
        name, place, where = _READ_AT[layout.reads]
        mark, ids = getattr(tokenizer, f"{name}_id"), list(tokenizer("a")["input_ids"])
        # Discovered families may have another token in this position (mBART: the language) or none (XLNet).
        if (ids[place] != mark) if layout.described else mark is None or ids.count(mark) != 1:
            raise ConfigError(
                f"{origin_of(model)}: the tokenizer puts no {name} {where} a text, which a "
                f"{architecture['model_type']} model's heads need"
            )
    elif not layout.described:
        tokenizer.padding_side = "right"
    if not layout.token_types:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]


def _read_marks_as_text(tokenizer: Any) -> None:
    """Make the tokenizer read special tokens in a text as plain characters. Other texts are encoded as before.

    BART's classification head finds the end of a text by the end token, and rejects a batch with unequal numbers of them.
    """
    tokenizer.split_special_tokens = True
    marks = [mark for mark in tokenizer.all_special_tokens if mark != tokenizer.unk_token]
    if tokenizer.is_fast and any(mark in tokenizer.tokenize(f"{mark} {mark}a{mark}") for mark in marks):
        # Some vocabularies, such as DeBERTa's, also contain the special tokens as pieces. Splitting prevents such pieces.
        first = "|".join(f"{re.escape(mark[0])}(?={re.escape(mark[1:])})" for mark in tokenizer.all_special_tokens)
        backend, split = tokenizer.backend_tokenizer, pre_tokenizers.Split(Regex(first), "isolated")
        before = [backend.pre_tokenizer] if backend.pre_tokenizer else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, split])


def _read_gguf_tokenizer(model: ModelConfig, location: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a GGUF file, without tokens beyond the file's vocabulary.

    transformers reads a byte-level vocabulary as GPT-2's. If the file has no `<|endoftext|>`, as for Llama 3, transformers
    adds it, but the model has no embedding for it. transformers would also mix in a `tokenizer.json` in the same folder.
    """
    file = Path(cached_file(location, model.gguf_file, revision=model.revision)).absolute()
    with tempfile.TemporaryDirectory() as nothing_beside:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(nothing_beside, gguf_file=str(file))
    words = read_gguf_architecture(file)["vocab_size"]
    if len(tokenizer) <= words:
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < words]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        model_input_names=tokenizer.model_input_names,
        **{name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    )
