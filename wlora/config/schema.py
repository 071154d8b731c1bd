"""The typed schema of a run. It declares every key once: type, default, rule, meaning, and whether it influences results.

Hydra fills these dataclasses from the YAML files under `conf/` and rejects unknown keys and wrong types. Five things are
derived from this schema: help, checks (`wlora.config.rules`), identity (`wlora.config.identity`), the keys that
`from=RUN_ID` may change, and the table of keys in the documentation. A method's own keys are declared in its YAML file.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf

TARGET_SETS = ("qkv", "attention", "all", "release")
# A choice in the rule of `targets`: names of modules.
MODULE_NAMES = "[NAME,...]"
QUANTIZATIONS = ("none", "nf4", "int8")
TRACKERS = ("none", "tensorboard", "wandb", "mlflow", "trackio")
# Descriptive entries of a method's YAML file. They are removed from the configuration before `run_id` is computed.
METHOD_NOTES = ("about", "paper", "allowed", "later", "preset", "presets", "ambiguous")

Decides = Literal["numbers", "origin", "execution", "nothing"]
"""What a key influences.

numbers: the results. The key is part of `run_id`.
origin: where data or weights come from. The key is part of `run_id` only if the content has no fingerprint (hub).
execution: how or when results are computed or measured, or the defaults of other keys. `from=RUN_ID` must keep the value.
nothing: only file locations, logging and the like. `from=RUN_ID` may change the value.
"""


def key(default: Any, rule: str, meaning: str, decides: Decides = "numbers", *, later: bool = False) -> Any:
    """Declare a key of the configuration.

    Args:
        default: the default value; for a list, mapping or section, the class to construct.
        rule: the allowed values (`wlora.config.rules`); empty if the type is sufficient.
        meaning: one line for help and documentation.
        decides: what the key influences.
        later: whether the key was added after records were published; it is then part of `run_id` only if it is not the
            default.
    """
    metadata = {"rule": rule, "meaning": meaning, "decides": decides, "later": later}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class GenerationOverrides:
    """Overrides of the model's `generation_config` for generating summaries; null keeps the model's value."""

    num_beams: int | None = key(None, "int >= 1 or null", "number of beams in beam search")
    max_new_tokens: int | None = key(None, "int >= 1 or null", "maximum number of tokens in a generated summary")
    min_new_tokens: int | None = key(None, "int >= 0 or null", "minimum number of tokens in a generated summary")
    length_penalty: float | None = key(None, "float or null", "exponent of the length in beam scores")


@dataclass
class TaskConfig:
    """A task: the source of its data, how inputs are built, and which metrics are reported."""

    name: str = key(MISSING, "", "name in records and tables")
    kind: str = key(MISSING, "", "what is predicted; see wlora/tasks/base.py")
    benchmark: str = key(MISSING, "", "benchmark that the task belongs to")
    hub_id: str | None = key(None, "", "data set on the hub", "origin")
    subset: str | None = key(None, "", "configuration (subset) of the data set on the hub", "origin")
    generator: str | None = key(None, "", "generator of synthetic data, used instead of files", "execution")
    columns: list[str] = key(list, "", "input columns, named as on the hub")
    text: Any = key(None, "", "text columns of your table, NAME or [NAME,NAME]; null: detected", "execution")
    label: Any = key(
        None,
        "",
        "label column, or [NAME,NAME] of 0 and 1; null: label or answers, or detected in your table",
        later=True,
    )
    labels: list[str] = key(
        list, "", "class names in order; empty for regression and text targets, and to detect them in a table"
    )
    class_weights: str = key(
        "none", "none | balanced", "balanced: rare classes have larger weights in the training loss", later=True
    )
    validation: Any = key(
        list,
        "",
        "evaluated splits (the first one is reported), or FILE, or a share such as 0.1, or folds=N of the training rows",
    )
    validation_path: str | None = key(None, "", "file of the evaluated rows; filled in from task.validation=FILE", "nothing")
    fold: int | None = key(
        None, "int >= 0 or null", "with task.validation=folds=N: the evaluated fold; null: all", later=True
    )
    split_seed: int = key(0, "int >= 0", "random seed of the split by task.validation=SHARE or folds=N", later=True)
    metrics: list[str] = key(list, "", "metrics to compute")
    primary_metric: str = key(MISSING, "", "metric that is reported and used for tuning")
    epochs: float = key(MISSING, "float > 0", "passes over the training data")
    batch_size: int = key(MISSING, "int >= 1", "examples per micro-batch")
    eval_batch_size: int = key(64, "int >= 1", "examples per evaluation batch", "nothing")
    max_length: int = key(128, "int >= 8", "maximum tokens of an input; for question answering, of one window")
    max_target_length: int | None = key(None, "int >= 4 or null", "maximum tokens of a training target", later=True)
    generation: GenerationOverrides = key(GenerationOverrides, "", "how summaries are generated", later=True)
    unanswerable: bool = key(False, "", "questions may have no answer (SQuAD v2.0)", later=True)
    stride: int | None = key(None, "int >= 0 or null", "overlap of consecutive windows in tokens", later=True)
    n_best: int | None = key(None, "int >= 1 or null", "best start and end positions combined into answers", later=True)
    max_answer_length: int | None = key(None, "int >= 1 or null", "maximum tokens of an answer", later=True)
    train_rows: int | None = key(None, "", "size of the training split on the hub, for dry runs", "execution")
    max_train_rows: int | None = key(None, "int >= 1 or null", "use a random sample of this many training rows; null: all")
    max_eval_rows: int | None = key(None, "int >= 1 or null", "maximum rows of each evaluated split; null: all")
    path: str | None = key(None, "", "file, or folder of files, with the task's columns, used instead of the hub", "nothing")
    revision: str = key("main", "", "commit or branch of the data set on the hub", "origin")
    preset: str | None = key(None, "", "published values for all keys that are not set explicitly: release", "execution")
    presets: dict[str, Any] = key(dict, "", "content of the presets", "execution")


@dataclass
class ModelConfig:
    """A pretrained model, or an architecture with random weights from a fixed seed (`source: random`)."""

    name: str = key(MISSING, "", "name in records and tables", "origin")
    source: str = key(MISSING, "hub | package | random", "source of the weights", "origin")
    hub_id: str | None = key(None, "", "repository on the hub", "origin")
    revision: str = key("main", "", "commit or branch of that repository", "origin")
    package: str | None = key(None, "", "Python package that contains the weights", "execution")
    sha256: str | None = key(None, "", "expected SHA-256 checksum of the package's weights", "execution")
    path: str | None = key(None, "", "local folder in transformers format, used instead of the hub", "nothing")
    head: str = key("fresh", "fresh | kept", "fresh: a new head; kept: the head stored in model.path", later=True)
    gguf_file: str | None = key(None, "", "GGUF file with the weights; they are dequantised", "origin", later=True)
    separate_pairs: bool = key(
        False, "", "put the end token between two texts if the tokenizer puts no token there", later=True
    )
    quantization: str = key("none", " | ".join(QUANTIZATIONS), "quantisation of the frozen linear layers", later=True)
    architecture: dict[str, Any] = key(dict, "", "transformers configuration, for counts and random weights", "origin")
    accumulation_steps: int | None = key(None, "", "default of train.accumulation_steps on GLUE", "execution")
    k: int | None = key(None, "", "default of k", "execution")


@dataclass
class TrainConfig:
    """Settings of the training loop that have no short key."""

    max_steps: int | None = key(None, "int >= 1 or null", "optimiser steps; null: task.epochs")
    accumulation_steps: int | None = key(
        None, "int >= 1 or null", "micro-batches per step; null: on GLUE as in the paper (DeBERTa 6, Llama 2), else 1"
    )
    weight_decay: float = key(0.01, "float >= 0", "decoupled weight decay of AdamW")
    max_grad_norm: float = key(1.0, "float > 0", "gradient clipping: maximum global norm")
    eval_every: int | None = key(
        None, "int >= 1 or null", "optimiser steps between evaluations; null: every epoch", "execution"
    )
    best: str | None = key(
        None,
        "",
        "metric (or loss): end with the adapters of the evaluation where it is best; null: with those of the last step",
        later=True,
    )
    patience: int | None = key(
        None,
        "int >= 1 or null",
        "stop after this many evaluations without a better train.best (or reported metric)",
        later=True,
    )
    gradient_checkpointing: bool = key(
        False, "", "recompute activations in the backward pass: slower, less memory", "nothing"
    )
    compile: str = key(
        "off",
        "off | graphs",
        "graphs: record the forward and backward pass of each length as a CUDA graph, and replay it (CUDA only)",
        "execution",
        later=True,
    )
    fast_step: bool = key(
        False,
        "",
        "faster dropout masks on CPUs, shared by adapters with the same input; adapters multiplied in the base's precision",
        later=True,
    )
    grow_batch: str = key(
        "off",
        "off | micro | effective",
        "after a cut, use the freed memory for larger micro-batches (micro; GPU only) or larger steps, too (effective)",
        later=True,
    )
    prefix_cache: str = key(
        "off",
        "off | memory | disk",
        "cache the outputs of the layers below the lowest adapter; disables dropout in these layers",
        later=True,
    )
    prefix_cache_dtype: str = key(
        "bf16", "bf16 | fp32", "dtype of the cached states; fp32 is exact and needs twice the space", later=True
    )
    prefix_cache_gb: float = key(
        8.0, "float >= 0", "maximum cache size in GB; examples that do not fit are recomputed every time", "execution"
    )
    fsdp: bool = key(False, "", "shard the frozen base over several processes (FSDP); method=lora only", "execution")
    checkpoint_every: int | None = key(
        None,
        "int >= 0 or null",
        "optimiser steps between checkpoints; null: at every evaluation; 0: only on a stop signal",
        "nothing",
    )
    until: float = key(
        1.0,
        "float > 0, <= 1",
        "share of the steps to train now; below 1, the run stops there with a checkpoint and can be continued",
        "nothing",
    )
    keep: int = key(2, "int >= 1", "number of newest checkpoints to keep", "nothing")
    keep_after: bool = key(False, "", "keep the checkpoints after a successful run", "nothing")
    save_adapter: bool = key(
        True, "", "save the trained adapters and head to <results_dir>/adapters/<run_id>, for adapter.path", "nothing"
    )
    save_model: bool = key(
        False,
        "",
        "save the trained model with merged adapters to <results_dir>/models/<run_id>, for model.path",
        "nothing",
    )


@dataclass
class AdapterConfig:
    """Adapters to start from: a folder in PEFT's format, for example the saved adapters of a run."""

    path: str | None = key(
        None, "", "adapters to start from: a folder in PEFT's format, which also sets their ranks and scales", "nothing"
    )
    head: bool = key(False, "", "also load the head from adapter.path")
    fingerprint: str | None = key(None, "", "content hash of adapter.path; filled in, and a different value is an error")


@dataclass
class Config:
    """One run. The short keys are those that sweeps usually vary; a method's YAML file interpolates those that it uses."""

    rank: int = key(8, "int >= 1", "rank of each adapter", "execution")
    alpha: float = key(32.0, "float > 0", "the scale of an adapter is alpha / rank", "execution")
    dropout: float = key(0.05, "float >= 0, < 1", "dropout probability on the input of an adapter", "execution")
    lr: Any = key(
        5e-4,
        "float > 0 or tuned or beyond",
        "peak learning rate; tuned: the best recorded value of this setting; beyond: if that is the smallest or largest "
        "tried, the next one outside the grid",
    )
    head_lr: Any = key(
        None, "float > 0 or null or tuned", "peak rate of head and pooler; null: lr; tuned: see lr", later=True
    )
    warmup: Any = key(
        None,
        "int >= 0 or null or tuned",
        "warm-up in optimiser steps; null: 100, at most a tenth of the run; tuned: see lr",
    )
    pack: Any = key(
        "auto",
        "int >= 1 or auto",
        "simultaneous runs with hydra/launcher=packed; auto: as many as fit into memory",
        "nothing",
    )
    tune_on: str | None = key(None, "", "task whose records are used for tuned; null: the task of the run", "execution")
    seed: int = key(0, "int >= 0", "random seed of initialisation, data order, dropout and random selection")
    k: int | None = key(
        None,
        "int >= 1 or null",
        "adapters to keep; null: 5 if n <= 48, else 20; wlora_plus: n/4; Llama 3 8B: 100",
        "execution",
    )
    targets: Any = key(
        "qkv",
        " | ".join((*TARGET_SETS, "SET@LAYER", MODULE_NAMES)),
        "linear layers with adapters; attention: qkv and output; release: as in the release; qkv@3: layers 3 and above; "
        "or a list of module names or their ends, with * for any characters",
        "execution",
    )
    precision: str = key("auto", "auto | fp32 | bf16 | fp16", "dtype of the frozen base; auto: by hardware", "execution")
    compat: str = key("paper", "paper | release", "release: reproduce where the published code deviates from the paper")
    results_dir: str = key("results", "", "folder for records and other results", "nothing")
    track: str = key("none", " | ".join(TRACKERS), "experiment tracker that also receives the learning curve", "nothing")
    offline: bool = key(False, "", "do not use the network", "nothing")
    dry_run: bool = key(False, "", "only print adapters, parameters and steps, without training", "nothing")
    race: str = key(
        "off",
        "off | halving",
        "in a sweep (-m): halving stops the worse half of learning rates and warm-ups at each of three rungs",
        "nothing",
    )
    force: bool = key(False, "", "run again even if a record exists", "nothing")
    experiment: str | None = key(None, "", "name of the experiment file", "execution")
    per_task: dict[str, Any] = key(dict, "", "task-specific values that an experiment's keys interpolate", "execution")
    task: TaskConfig = key(TaskConfig, "", "the task")
    model: ModelConfig = key(ModelConfig, "", "the frozen base model")
    method: dict[str, Any] = key(dict, "", "the method and its own keys")
    train: TrainConfig = key(TrainConfig, "", "the training loop")
    adapter: AdapterConfig = key(AdapterConfig, "", "adapters to start from")


def walk(kind: type = Config, path: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield the full name and field of every key of a schema, nested sections included: `lr`, `task.epochs`."""
    for part in dataclasses.fields(kind):
        inner = part.default_factory
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from walk(inner, f"{path}{part.name}.")
        else:
            yield f"{path}{part.name}", part


def restore_config(content: dict[str, Any]) -> Config:
    """Build the configuration stored in a record. Keys missing in it get their defaults; unknown keys are ignored.

    Raises:
        KeyError: a key without a default is missing.
    """
    config: Config = _restore(Config, content)
    return config


def _restore(kind: Any, content: dict[str, Any]) -> Any:
    values = {}
    for part in dataclasses.fields(kind):
        if part.name in content:
            value, inner = content[part.name], part.default_factory
            values[part.name] = _restore(inner, value) if dataclasses.is_dataclass(inner) else value
        elif part.default == MISSING:
            raise KeyError(part.name)
    return kind(**values)


def register_schema() -> None:
    """Register the dataclasses with Hydra as the schema on which `conf/config.yaml` is based."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def config_folder() -> Path:
    """Return the folder of the YAML files: inside the package if installed from a wheel, else next to the package."""
    package = Path(__file__).parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


@functools.cache
def method_names() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    return tuple(sorted(file.stem for file in (config_folder() / "method").glob("*.yaml")))


@functools.cache
def read_method(name: str) -> dict[str, Any]:
    """Return the content of a method's YAML file with unresolved interpolations. Callers must not modify it.

    The result is empty for an unknown method, for example one in a record of a newer version.
    """
    if name not in method_names():
        return {}
    content: Any = OmegaConf.to_container(OmegaConf.load(config_folder() / "method" / f"{name}.yaml"))
    return dict(content.get("method", content))
