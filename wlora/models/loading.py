"""Models and tokenizers: from the hub, a local folder, a package or (tests) at random, always in an explicit dtype."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from wlora.config.schema import ModelConfig
from wlora.console import notice
from wlora.errors import ConfigError, ran_out_of_memory
from wlora.models.architectures import read_architecture
from wlora.models.deberta_attention import replace_attention
from wlora.models.gguf import read_gguf_architecture
from wlora.models.heads import AUTO, HEAD_NAMES, LM_HEAD, head_parameters, make_config, start_head
from wlora.models.quantization import keep_differentiable, loading_options, pack_on_meta
from wlora.models.source import ModelSource, unchanged
from wlora.models.targets import find_layout, tell_layout
from wlora.models.written_attention import write_out_attention

# Random base weights stand for pretrained ones, so they are the same for every seed of a run.
_RANDOM_BASE_SEED = 0
_CPU = torch.device("cpu")
# The token that heads read a text by, and where it is; those of decoders take the last one, whichever it is.
_READ_AT = {"first": ("cls_token", 0, "before"), "end": ("eos_token", -1, "behind")}


def load_tokenizer(model: ModelConfig, source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model, of a GGUF file its own; `trust_remote_code` is never set.

    A special token that stands in a text is read as plain text. One without a padding token, such as Llama's, pads with
    its end-of-sequence token: padding is masked, and the classification heads look for the last token that is not padding,
    which no text ends in.

    Raises:
        ConfigError: no tokenizer, one that cannot be read, one without either token, or one that does not put the token
            before or behind a text that the model's heads read.
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
        except Exception as error:  # those of three libraries, one of them a bare Exception
            raise ConfigError(f"{_origin(model)}: the tokenizer cannot be loaded ({_reason(error)})") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # Without vocabulary files transformers builds a tokenizer all the same, to which every word is unknown.
        raise ConfigError(f"{_origin(model)}: there is no tokenizer (tokenizer.json, spm.model or vocab.txt)")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"{_origin(model)}: the tokenizer has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    _read_marks_as_text(tokenizer)
    _fit_tokenizer(tokenizer, model)
    return tokenizer


def _fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> None:
    """Check that a tokenizer writes what the model's heads read, and let it write nothing that the model cannot take.

    The tokenizer of a discovered decoder pads on the right, because its positions are counted from the left.

    Raises:
        ConfigError: the token that the heads read is missing.
    """
    architecture = read_architecture(model)
    layout = find_layout(architecture)
    if layout.reads in _READ_AT:
        name, place, where = _READ_AT[layout.reads]
        mark, ids = getattr(tokenizer, f"{name}_id"), list(tokenizer("a")["input_ids"])
        # Discovered families may put another token in this place: mBART its language, XLNet none at all.
        if (ids[place] != mark) if layout.described else mark is None or ids.count(mark) != 1:
            raise ConfigError(
                f"{_origin(model)}: the tokenizer puts no {name} {where} a text, which a "
                f"{architecture['model_type']} model's heads need"
            )
    elif not layout.described:
        tokenizer.padding_side = "right"
    if not layout.token_types:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]


def _read_marks_as_text(tokenizer: Any) -> None:
    """Let special tokens that stand in a text be read as the characters they are; other texts are encoded as before.

    BART's classification head finds the end of a text by the end token, and refuses a batch with unequal numbers of them.
    """
    tokenizer.split_special_tokens = True
    marks = [mark for mark in tokenizer.all_special_tokens if mark != tokenizer.unk_token]
    if tokenizer.is_fast and any(mark in tokenizer.tokenize(f"{mark} {mark}a{mark}") for mark in marks):
        # Some vocabularies, such as DeBERTa's, hold the special tokens among their pieces. No piece crosses a split.
        first = "|".join(f"{re.escape(mark[0])}(?={re.escape(mark[1:])})" for mark in tokenizer.all_special_tokens)
        backend, split = tokenizer.backend_tokenizer, pre_tokenizers.Split(Regex(first), "isolated")
        before = [backend.pre_tokenizer] if backend.pre_tokenizer else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, split])


def _read_gguf_tokenizer(model: ModelConfig, location: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a GGUF file, without tokens beyond the file's vocabulary.

    transformers reads a byte-level vocabulary as GPT-2's and adds GPT-2's `<|endoftext|>` where the file has none, as
    Llama 3's has not: the model has no embedding for it. A `tokenizer.json` beside the file it would mix with the file's.
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


def load_model(
    model: ModelConfig,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: str,
    num_labels: int,
    seed: int,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load a model with its head in float32, all parameters frozen: `load_base`, then `start_head`.

    Args:
        seed: seed of the head's initialisation.
        (the others): as for `load_base`.

    Raises:
        ConfigError: as `load_base`.
    """
    loaded, fresh = load_base(model, source, tokenizer, head=head, num_labels=num_labels, device=device, dtype=dtype)
    start_head(loaded, fresh, seed)
    return loaded


def load_base(
    model: ModelConfig,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: str,
    num_labels: int,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model in float32, all parameters frozen.

    A head outside the pretrained model is fresh even where the checkpoint has one of that shape, which was trained for
    another task; with `model.head=kept` it is the checkpoint's. BERT's pooler is inside: it comes with the checkpoint.

    With `model.quantization` the linears of the body are packed as they are read, on the device where they will run.

    Weights come from safetensors where the repository has them, else from `pytorch_model.bin`, which transformers
    reads with `weights_only=True`. Only parameters of the head may be missing there.

    Args:
        head: the kind of head, a key of `AUTO`.
        num_labels: outputs of the head; 1 for regression, 2 (start, end) for question answering.
        device: where a quantised model is put; any other is loaded on the CPU.
        dtype: what a quantised model computes in.

    Returns:
        The model, and the names of the head's parameters that `start_head` has to initialise.

    Raises:
        ConfigError: files that cannot be read or are more than tensors, a checkpoint that lacks parts of the body or
            has them in other shapes, a tokenizer with more tokens than the model knows.
    """
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    if source.location is None:
        loaded, fresh = _build_random(model, tokenizer, head, num_labels)
    else:
        layout = find_layout(read_architecture(model), head)
        unpacked = (*HEAD_NAMES, LM_HEAD, *layout.head)
        packing = loading_options(model.quantization, unpacked=unpacked, device=device, dtype=dtype)
        with unchanged(model, source):
            loaded, fresh = _load_pretrained(model, source, head, num_labels, packing)
        keep_differentiable(loaded)
        _check_special_tokens(loaded, tokenizer, model, head)
        if not layout.described:
            notice(tell_layout(loaded.config.model_type, layout))
    known = loaded.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        raise ConfigError(f"{_origin(model)}: the tokenizer has {len(tokenizer)} tokens, the model {known}")
    loaded.config.pad_token_id = tokenizer.pad_token_id
    loaded.config.problem_type = None  # that of the last training, which may have had labels of another kind
    if head != "seq2seq":
        loaded.config.use_cache = False  # keys and values of past tokens serve generation only
    replace_attention(loaded)
    write_out_attention(loaded)
    loaded.requires_grad_(False)
    return loaded, fresh


def _check_special_tokens(
    loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, head: str
) -> None:
    """Check the special tokens of an encoder-decoder, whose head or generation would fail later.

    Raises:
        ConfigError: the tokenizer ends a text with another token than the model, or the model cannot begin a text.
    """
    config = loaded.config
    if not config.is_encoder_decoder:
        return
    if head == "sequence_classification" and config.eos_token_id != tokenizer.eos_token_id:
        raise ConfigError(
            f"{_origin(model)}: eos_token_id in config.json is {config.eos_token_id}: allowed is "
            f"{tokenizer.eos_token_id}, the tokenizer's, by which the head finds the end of a text"
        )
    if head == "seq2seq":
        generation = loaded.generation_config
        if generation.decoder_start_token_id is None and generation.bos_token_id is None:
            raise ConfigError(
                f"{_origin(model)}: config.json has neither decoder_start_token_id nor bos_token_id: allowed is one "
                "of them, with which a generated text begins"
            )


def build_unloaded(
    model: ModelConfig, architecture: dict[str, Any], *, head: str, num_labels: int, device: str = "meta"
) -> PreTrainedModel:
    """Build an architecture, all parameters frozen: with random weights on a device, with none on `meta`, for counting."""
    config = _make_config(model, architecture, num_labels)
    with torch.device(device):
        built = _build(model, config, head)
    replace_attention(built)
    write_out_attention(built)
    pack_on_meta(built, model.quantization)
    built.requires_grad_(False)
    return built


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of layers for the backward pass, which computes the rest again (`train.gradient_checkpointing`).

    Dropout draws the same numbers both times, so losses and gradients do not change.

    Raises:
        ConfigError: transformers cannot do this for the model's family.
    """
    if not model.supports_gradient_checkpointing:
        family = model.config.model_type
        raise ConfigError(
            f"train.gradient_checkpointing=true: allowed is false for {family} models, of which it is not supported"
        )
    with quiet():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers makes the embeddings' output require a gradient, for reentrant checkpointing's sake. Ours needs none,
    # and with it the backward pass would run down to the embeddings instead of ending at the lowest adapter.
    model.disable_input_require_grads()


def _build_random(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, head: str, num_labels: int
) -> tuple[PreTrainedModel, list[str]]:
    architecture = dict(model.architecture, vocab_size=len(tokenizer))
    config = _make_config(model, architecture, num_labels)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    if config.is_encoder_decoder:
        # As in BART, the end of a text starts the decoder, and a text that is cut short is ended.
        config.decoder_start_token_id = config.forced_eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(_RANDOM_BASE_SEED)
    built = _build(model, config, head)
    return built, list(head_parameters(built))


def _load_pretrained(
    model: ModelConfig, source: ModelSource, head: str, num_labels: int, packing: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    try:
        # transformers unpacks GGUF files under a progress bar of its own that no setting silences.
        unpacking = contextlib.redirect_stderr(io.StringIO()) if model.gguf_file else contextlib.nullcontext()
        with quiet(), unpacking:
            loaded, report = AUTO[head].from_pretrained(
                source.location,
                revision=model.revision,
                gguf_file=model.gguf_file,
                **packing,
                num_labels=num_labels,
                dtype=torch.float32,
                output_loading_info=True,
                # A head for another number of labels is replaced; other shapes in the body are refused below.
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # those of four libraries, without a common class
        if ran_out_of_memory(error):
            raise
        raise ConfigError(f"{_origin(model)}: the weights cannot be loaded ({_reason(error)})") from error
    head_names = list(head_parameters(loaded))
    absent = sorted(set(report["missing_keys"]) - set(head_names))
    if absent:
        number = f"{len(absent)} tensors of the body, among them " if len(absent) > 1 else ""
        raise ConfigError(f"{_origin(model)}: the checkpoint lacks {number}{absent[0]}")
    for name, given, expected in report["mismatched_keys"]:
        if name not in head_names:
            shapes = f"{list(given)} in the checkpoint, {list(expected)} by config.json"
            raise ConfigError(f"{_origin(model)}: {name} is {shapes}")
    assert isinstance(loaded, PreTrainedModel)
    unfit = {*report["missing_keys"], *(name for name, _, _ in report["mismatched_keys"])}
    lacking = [name for name in head_names if name in unfit]
    if model.head == "kept" and lacking:
        # The last is of the outputs, which name the kind of head.
        raise ConfigError(
            f"model.head=kept: {_origin(model)} has no {lacking[-1]} of this shape\nallowed is fresh, for a new head"
        )
    outside = {name for name in head_names if not name.startswith(f"{loaded.base_model_prefix}.")}
    return loaded, sorted(unfit if model.head == "kept" else unfit | outside)


def _build(model: ModelConfig, config: PretrainedConfig, head: str) -> PreTrainedModel:
    """Build a model with random weights on the present device."""
    try:
        built: PreTrainedModel = AUTO[head].from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever an odd size makes transformers or torch raise
        if ran_out_of_memory(error):
            raise
        raise ConfigError(f"{_origin(model)}: the architecture cannot be built ({_reason(error)})") from error
    return built


def _make_config(model: ModelConfig, architecture: dict[str, Any], num_labels: int) -> PretrainedConfig:
    try:
        return make_config(architecture, num_labels=num_labels)
    except Exception as error:  # its own checks of types have a class of their own
        raise ConfigError(f"{_origin(model)}: the architecture cannot be built ({_reason(error)})") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and torch while they load or save: what matters of their reports is said by an error."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _origin(model: ModelConfig) -> str:
    return f"model.path={model.path}" if model.path else f"model={model.name}"


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        # torch's own text explains how to run the file all the same.
        return "the file is damaged or holds more than tensors; nothing in it was run"
    if isinstance(error, EOFError) or "zip archive" in str(error) or getattr(error, "errno", None) == errno.EINVAL:
        # What torch says of a file cut short depends on where it ends.
        return "the file is incomplete or damaged"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
