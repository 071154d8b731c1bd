"""The typed schema of a run: every key once, with its type, default, rule, meaning, and what it decides.

Hydra composes these dataclasses from the YAML files under `conf/` and refuses unknown keys and wrong types. Help, checks
(`wlora.config.rules`), identity (`wlora.config.identity`), what `from=RUN_ID` may change, and the documentation's table of
keys are read from here. A method's own keys stand in its YAML. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

TARGET_SETS = ("qkv", "attention", "all", "release")
QUANTIZATIONS = ("none", "nf4", "int8")
TRACKERS = ("none", "tensorboard", "wandb", "mlflow", "trackio")
# What a method's YAML says about itself; it leaves the configuration before the run_id is taken.
METHOD_NOTES = ("about", "paper", "allowed", "later", "preset", "presets", "ambiguous")

Decides = Literal["numbers", "origin", "course", "nothing"]
"""What a key decides.

numbers: the result; it is part of `run_id`.
origin: where content comes from; it is part of `run_id` only where the content itself is not known (the hub).
course: not the result, but how or when it is computed or measured, or defaults of other keys; a repetition keeps it.
nothing: only where files are and what is logged; a repetition may change it.
"""


def key(default: Any, rule: str, meaning: str, decides: Decides = "numbers", *, later: bool = False) -> Any:
    """Declare a key of a configuration.

    Args:
        default: its value, or for a list, mapping or section the class that makes it.
        rule: what is allowed (`wlora.config.rules`); empty where the type says it all.
        meaning: one line for help and documentation.
        decides: what it decides.
        later: it was added after records were published: it is part of `run_id` only where it is not the default.
    """
    metadata = {"rule": rule, "meaning": meaning, "decides": decides, "later": later}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class GenerationOverrides:
    """What differs from the model's own `generation_config` when it writes summaries; null keeps the model's."""

    num_beams: int | None = key(None, "int >= 1 or null", "beams of the search")
    max_new_tokens: int | None = key(None, "int >= 1 or null", "most tokens of a summary")
    min_new_tokens: int | None = key(None, "int >= 0 or null", "fewest tokens of a summary")
    length_penalty: float | None = key(None, "float or null", "exponent of the length in a beam's score")


@dataclass
class TaskConfig:
    """A benchmark: where its rows come from, how they are read and what is reported."""

    name: str = key(MISSING, "", "name in records and tables")
    kind: str = key(MISSING, "", "classification, question_answering or summarization")
    benchmark: str = key(MISSING, "", "the benchmark that it belongs to")
    hub_id: str | None = key(None, "", "data set on the hub", "origin")
    subset: str | None = key(None, "", "configuration of that data set", "origin")
    generator: str | None = key(None, "", "synthetic task that makes the rows, in place of files", "course")
    columns: list[str] = key(list, "", "columns of the inputs, in the schema of the hub")
    labels: list[str] = key(list, "", "names of the classes, in their order; empty for values and texts")
    validation: list[str] = key(list, "", "splits that are evaluated; the first one is reported")
    metrics: list[str] = key(list, "", "metrics that are computed")
    primary_metric: str = key(MISSING, "", "the metric that is reported and tuned by")
    epochs: float = key(MISSING, "float > 0", "passes over the training rows")
    batch_size: int = key(MISSING, "int >= 1", "rows of a micro-batch")
    eval_batch_size: int = key(64, "int >= 1", "rows of an evaluation batch", "nothing")
    max_length: int = key(128, "int >= 8", "most tokens of an input, or of a window of one")
    max_target_length: int | None = key(None, "int >= 4 or null", "most tokens of a summary in training", later=True)
    generation: GenerationOverrides = key(GenerationOverrides, "", "how summaries are generated", later=True)
    unanswerable: bool = key(False, "", "questions may have no answer (SQuAD v2.0)", later=True)
    stride: int | None = key(None, "int >= 0 or null", "tokens that neighbouring windows share", later=True)
    n_best: int | None = key(None, "int >= 1 or null", "starts and ends that are combined to answers", later=True)
    max_answer_length: int | None = key(None, "int >= 1 or null", "most tokens of an answer", later=True)
    train_rows: int | None = key(None, "", "rows of the hub's training split, for dry runs", "course")
    max_train_rows: int | None = key(None, "int >= 1 or null", "training rows that are drawn; null: all")
    max_eval_rows: int | None = key(None, "int >= 1 or null", "rows of each evaluated split; null: all")
    path: str | None = key(None, "", "folder of local files in the benchmark's schema, in place of the hub", "nothing")
    revision: str = key("main", "", "commit or branch of the data set on the hub", "origin")
    preset: str | None = key(None, "", "published values for defaults that are not given: release", "course")
    presets: dict[str, Any] = key(dict, "", "values of the presets", "course")


@dataclass
class ModelConfig:
    """A pretrained model, or (`source: random`) an architecture with fixed random weights."""

    name: str = key(MISSING, "", "name in records and tables", "origin")
    source: str = key(MISSING, "hub | package | random", "where the weights come from", "origin")
    hub_id: str | None = key(None, "", "repository on the hub", "origin")
    revision: str = key("main", "", "commit or branch of that repository", "origin")
    package: str | None = key(None, "", "Python package that carries the weights", "course")
    sha256: str | None = key(None, "", "checksum that the package's weights must have", "course")
    path: str | None = key(None, "", "local folder of transformers, in place of the hub", "nothing")
    head: str = key("fresh", "fresh | kept", "kept: the head of model.path, too", later=True)
    gguf_file: str | None = key(None, "", "weights in a GGUF file, unpacked", "origin", later=True)
    quantization: str = key("none", " | ".join(QUANTIZATIONS), "of the frozen base's linears", later=True)
    architecture: dict[str, Any] = key(dict, "", "configuration of transformers, for counting and random weights", "origin")
    accumulation_steps: int | None = key(None, "", "default of train.accumulation_steps on GLUE", "course")
    k: int | None = key(None, "", "default of k", "course")


@dataclass
class TrainConfig:
    """Everything about the training loop that has no short key of its own."""

    max_steps: int | None = key(None, "int >= 1 or null", "optimiser steps; null: task.epochs")
    accumulation_steps: int | None = key(
        None, "int >= 1 or null", "micro-batches of a step; null: the paper's for GLUE (6 on DeBERTa, 2 on Llama), else 1"
    )
    weight_decay: float = key(0.01, "float >= 0", "decoupled decay of AdamW")
    max_grad_norm: float = key(1.0, "float > 0", "bound of the global norm of gradients")
    eval_every: int | None = key(
        None, "int >= 1 or null", "optimiser steps between evaluations; null: every epoch", "course"
    )
    gradient_checkpointing: bool = key(
        False, "", "compute a layer's activations again instead of keeping them: slower, less memory", "nothing"
    )
    grow_batch: str = key(
        "off",
        "off | micro | effective",
        "into memory that a cut has freed; micro: the micro-batch (not on a CPU); effective: the rows of a step, too",
        later=True,
    )
    prefix_cache: str = key(
        "off",
        "off | memory | disk",
        "store what the layers below the lowest adapter give, their dropout off",
        later=True,
    )
    prefix_cache_dtype: str = key(
        "bf16", "bf16 | fp32", "of the stored states; fp32 is exact, and twice as large", later=True
    )
    prefix_cache_gb: float = key(
        8.0, "float >= 0", "most that is stored; rows beyond it are computed anew every time", "course"
    )
    fsdp: bool = key(False, "", "the frozen base in pieces over several processes (FSDP); method=lora only", "course")
    checkpoint_every: int | None = key(
        None,
        "int >= 0 or null",
        "optimiser steps between checkpoints; null: at every evaluation; 0: only when a signal asks",
        "nothing",
    )
    keep: int = key(2, "int >= 1", "checkpoints that are kept, the newest ones", "nothing")
    keep_after: bool = key(False, "", "keep checkpoints after success, too", "nothing")
    save_adapter: bool = key(
        True, "", "keep the trained adapters and head in <results_dir>/adapters/<run_id>: usable as adapter.path", "nothing"
    )
    save_model: bool = key(
        False,
        "",
        "write the trained model, adapters folded in, to <results_dir>/models/<run_id>: usable as model.path",
        "nothing",
    )


@dataclass
class AdapterConfig:
    """Adapters to start from: a folder in PEFT's format, such as a run leaves behind."""

    path: str | None = key(
        None, "", "adapters to start from: a folder in PEFT's format; its ranks and scales count", "nothing"
    )
    head: bool = key(False, "", "the head starts from that folder, too")
    fingerprint: str | None = key(None, "", "of that folder's content; filled in, and another one is refused")


@dataclass
class Config:
    """One run. The short keys are the ones sweeps turn; a method's YAML interpolates those it reads."""

    rank: int = key(8, "int >= 1", "components per adapter", "course")
    alpha: float = key(32.0, "float > 0", "the scale of an adapter is alpha / rank", "course")
    dropout: float = key(0.05, "float >= 0, < 1", "probability of dropping an element of an adapter's input", "course")
    lr: Any = key(5e-4, "float > 0 or tuned", "peak of the linear schedule; tuned: the best recorded one of this setting")
    head_lr: Any = key(None, "float > 0 or null or tuned", "peak for head and pooler; null: lr; tuned: as lr", later=True)
    warmup: Any = key(
        None,
        "int >= 0 or null or tuned",
        "optimiser steps; null: 100, or a tenth of the run if that is less; tuned: as lr",
    )
    tune_on: str | None = key(None, "", "with tuned: the task whose records decide; null: the run's own", "course")
    seed: int = key(0, "int >= 0", "of initialisation, order, dropout and random choices")
    k: int | None = key(
        None, "int >= 1 or null", "adapters to keep; null: 5 of up to 48, else 20; wlora_plus n/4; Llama 3 8B 100", "course"
    )
    targets: str = key(
        "qkv",
        " | ".join((*TARGET_SETS, "SET@LAYER")),
        "linears with adapters; attention: and output; release: those the published code trains; qkv@3: from layer 3 up",
        "course",
    )
    precision: str = key("auto", "auto | fp32 | bf16 | fp16", "of the frozen base; auto: by the hardware", "course")
    compat: str = key("paper", "paper | release", "release: reproduce the published code's deviations")
    results_dir: str = key("results", "", "folder of the records", "nothing")
    track: str = key("none", " | ".join(TRACKERS), "an experiment tracker that gets the learning curve, too", "nothing")
    offline: bool = key(False, "", "never touch the network", "nothing")
    dry_run: bool = key(False, "", "print adapters, parameters and steps; train nothing", "nothing")
    force: bool = key(False, "", "run again although the record exists", "nothing")
    experiment: str | None = key(None, "", "name of the experiment's file", "course")
    per_task: dict[str, Any] = key(dict, "", "an experiment's figures by task, which its other keys read", "course")
    task: TaskConfig = key(TaskConfig, "", "the benchmark")
    model: ModelConfig = key(ModelConfig, "", "the frozen base")
    method: dict[str, Any] = key(dict, "", "the adapter method and its own keys")
    train: TrainConfig = key(TrainConfig, "", "the training loop")
    adapter: AdapterConfig = key(AdapterConfig, "", "adapters to start from")


def walk(kind: type = Config, path: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every key below the sections of a schema, with its full name: `lr`, `task.epochs`."""
    for part in dataclasses.fields(kind):
        inner = part.default_factory
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from walk(inner, f"{path}{part.name}.")
        else:
            yield f"{path}{part.name}", part


def restore_config(content: dict[str, Any]) -> Config:
    """Return the configuration that a record holds: keys added since take their defaults, others are left out.

    Raises:
        KeyError: one that every record has.
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
    """Make the dataclasses the schema that `conf/config.yaml` starts from."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def config_folder() -> Path:
    """Return the folder of the YAML files: inside an installed wheel, else beside the package."""
    package = Path(__file__).parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
