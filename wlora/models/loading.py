"""Load models from the hub, a local folder or a package, or create random models; always in float32."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from wlora.config.schema import ModelConfig
from wlora.console import notice
from wlora.errors import ConfigError, ran_out_of_memory
from wlora.models.architectures import read_architecture
from wlora.models.deberta_attention import replace_attention
from wlora.models.heads import AUTO, HEAD_NAMES, LM_HEAD, head_parameters, make_config, start_head
from wlora.models.quantization import keep_differentiable, loading_options, pack_on_meta
from wlora.models.source import ModelSource, unchanged
from wlora.models.targets import find_layout, tell_layout
from wlora.models.written_attention import write_out_attention

# Random base weights take the role of pretrained ones, so they do not depend on the seed of the run.
_RANDOM_BASE_SEED = 0
_CPU = torch.device("cpu")


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

    The head is new even if the checkpoint contains one of the same shape, which was trained for another task. With
    `model.head=kept` it is loaded from the checkpoint. BERT's pooler is part of the pretrained model and is loaded.

    With `model.quantization`, the linear modules of the body are quantised while loading, on the device of the run.

    Weights are read from safetensors files if there are any, otherwise from `pytorch_model.bin`, which transformers reads
    with `weights_only=True`. Only parameters of the head may be missing in the checkpoint.

    Args:
        head: the kind of head, a key of `AUTO`.
        num_labels: outputs of the head; 1 for regression, 2 (start, end) for question answering.
        device: device of a quantised model; other models are loaded on the CPU.
        dtype: dtype of a quantised model's computation.

    Returns:
        The model, and the names of the head's parameters that `start_head` must initialise.

    Raises:
        ConfigError: files cannot be read or contain other objects than tensors; the checkpoint lacks parts of the body or
            has them in other shapes; the tokenizer has more tokens than the model.
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
        raise ConfigError(f"{origin_of(model)}: the tokenizer has {len(tokenizer)} tokens, the model {known}")
    loaded.config.pad_token_id = tokenizer.pad_token_id
    loaded.config.problem_type = None  # set by an earlier training, possibly with another kind of labels
    if head != "seq2seq":
        loaded.config.use_cache = False  # cached keys and values are used in generation only
    replace_attention(loaded)
    write_out_attention(loaded)
    loaded.requires_grad_(False)
    return loaded, fresh


def _check_special_tokens(
    loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, head: str
) -> None:
    """Check the special tokens of an encoder-decoder. With wrong ones, its head or generation would fail later.

    Raises:
        ConfigError: tokenizer and model have different end tokens, or the model has no token to start generation.
    """
    config = loaded.config
    if not config.is_encoder_decoder:
        return
    if head == "sequence_classification" and config.eos_token_id != tokenizer.eos_token_id:
        raise ConfigError(
            f"{origin_of(model)}: eos_token_id in config.json is {config.eos_token_id}: allowed is "
            f"{tokenizer.eos_token_id}, the tokenizer's end token, by which the head finds the end of a text"
        )
    if head == "seq2seq":
        generation = loaded.generation_config
        if generation.decoder_start_token_id is None and generation.bos_token_id is None:
            raise ConfigError(
                f"{origin_of(model)}: config.json has neither decoder_start_token_id nor bos_token_id: allowed is one "
                "of them, with which a generated text begins"
            )


def build_unloaded(
    model: ModelConfig, architecture: dict[str, Any], *, head: str, num_labels: int, device: str = "meta"
) -> PreTrainedModel:
    """Build an architecture with all parameters frozen: with random weights, or on `meta` without weights, for counting."""
    config = _make_config(model, architecture, num_labels)
    with torch.device(device):
        built = _build(model, config, head)
    replace_attention(built)
    write_out_attention(built)
    pack_on_meta(built, model.quantization)
    built.requires_grad_(False)
    return built


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Save only the inputs of layers; the backward pass recomputes the other activations (`train.gradient_checkpointing`).

    Dropout draws the same numbers both times, so losses and gradients do not change.

    Raises:
        ConfigError: transformers cannot do this for the model's family.
    """
    if not model.supports_gradient_checkpointing:
        family = model.config.model_type
        raise ConfigError(
            f"train.gradient_checkpointing=true: allowed is false for {family} models, which do not support it"
        )
    with quiet():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers makes the output of the embeddings require a gradient, which reentrant checkpointing needs. The variant
    # used here does not need it, and the backward pass would not end at the lowest adapter but at the embeddings.
    model.disable_input_require_grads()


def _build_random(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, head: str, num_labels: int
) -> tuple[PreTrainedModel, list[str]]:
    architecture = dict(model.architecture, vocab_size=len(tokenizer))
    config = _make_config(model, architecture, num_labels)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    if config.is_encoder_decoder:
        # As in BART, the end token starts the decoder and is forced at the maximum length.
        config.decoder_start_token_id = config.forced_eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(_RANDOM_BASE_SEED)
    built = _build(model, config, head)
    return built, list(head_parameters(built))


def _load_pretrained(
    model: ModelConfig, source: ModelSource, head: str, num_labels: int, packing: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    try:
        # transformers shows a progress bar for GGUF files that no setting switches off.
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
                # A head for another number of labels is replaced. Other wrong shapes raise an error below.
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # four libraries raise exceptions without a common class
        if ran_out_of_memory(error):
            raise
        raise ConfigError(f"{origin_of(model)}: the weights cannot be loaded ({reason_of(error)})") from error
    head_names = list(head_parameters(loaded))
    absent = sorted(set(report["missing_keys"]) - set(head_names))
    if absent:
        number = f"{len(absent)} tensors of the body, among them " if len(absent) > 1 else ""
        raise ConfigError(f"{origin_of(model)}: the checkpoint lacks {number}{absent[0]}")
    for name, given, expected in report["mismatched_keys"]:
        if name not in head_names:
            shapes = f"{list(given)} in the checkpoint, {list(expected)} by config.json"
            raise ConfigError(f"{origin_of(model)}: {name} is {shapes}")
    assert isinstance(loaded, PreTrainedModel)
    unfit = {*report["missing_keys"], *(name for name, _, _ in report["mismatched_keys"])}
    lacking = [name for name in head_names if name in unfit]
    if model.head == "kept" and lacking:
        # The last missing parameter belongs to the output layer, whose name tells the kind of head.
        raise ConfigError(
            f"model.head=kept: {origin_of(model)} has no {lacking[-1]} of this shape\nallowed is fresh, for a new head"
        )
    outside = {name for name in head_names if not name.startswith(f"{loaded.base_model_prefix}.")}
    return loaded, sorted(unfit if model.head == "kept" else unfit | outside)


def _build(model: ModelConfig, config: PretrainedConfig, head: str) -> PreTrainedModel:
    """Build a model with random weights on the current device."""
    try:
        built: PreTrainedModel = AUTO[head].from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers and torch raise many kinds of exceptions for invalid sizes
        if ran_out_of_memory(error):
            raise
        raise ConfigError(f"{origin_of(model)}: the architecture cannot be built ({reason_of(error)})") from error
    return built


def _make_config(model: ModelConfig, architecture: dict[str, Any], num_labels: int) -> PretrainedConfig:
    try:
        return make_config(architecture, num_labels=num_labels)
    except Exception as error:  # the type checks of transformers raise their own exception class
        raise ConfigError(f"{origin_of(model)}: the architecture cannot be built ({reason_of(error)})") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages of transformers and torch while they load or save. Problems are raised as errors instead."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def origin_of(model: ModelConfig) -> str:
    """Return how messages name a model: by its folder or its name."""
    return f"model.path={model.path}" if model.path else f"model={model.name}"


def reason_of(error: Exception) -> str:
    """Return the first line of an error of a library, or what it means."""
    if isinstance(error, pickle.UnpicklingError):
        # torch's own message explains how to load the file without this protection.
        return "the file is damaged or contains other objects than tensors; nothing in it was run"
    if isinstance(error, EOFError) or "zip archive" in str(error) or getattr(error, "errno", None) == errno.EINVAL:
        # For a truncated file, torch's message depends on where the file ends.
        return "the file is incomplete or damaged"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
