"""The typed schema of a run, and its identity.

The YAML files under `conf/` fill these dataclasses; Hydra composes them and refuses unknown keys and wrong
types. Ranges are checked in `wlora.config.validation`. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

RUN_ID_VERSION = 1
# Marks a field that records without it already exist for: it is part of `run_id` only off its default.
LATER = {"later": True}
# What a method's YAML says about itself; it leaves the configuration before the run_id is taken.
METHOD_NOTES = ("about", "paper", "allowed", "preset", "presets", "ambiguous")
# The same for a method's keys: those added after records were published, with what a record without them stands for.
_OMEGA = {"omega_scheduled": False, "omega_clipped": False}
METHOD_LATER: dict[str, dict[str, Any]] = {
    "wlora": _OMEGA,
    "wlora_depth": _OMEGA,
    "wlora_plus": {**_OMEGA, "keep_moments": False},
    "rlora": {**_OMEGA, "lr_omega": 5.0, "project_every": 1},
}


def method_revision(method: dict[str, Any], *, release: bool) -> int:
    """Return which revision of its policy's numerics a method's keys stand for: 2 where they mean other numbers than once.

    It stands in the configuration as `method.revision`, but for 1, and so in `run_id`. Revision 2 of the selecting methods
    has another default of T; of `wlora_plus` another second halving, and other ranks where n is no multiple of K; of `rlora`
    the set acts from the first projection on; of `alora` components that stay keep their moments.
    """
    match method["name"]:
        case "wlora" | "wlora_depth":
            changed = not release and method["select_steps"] is None
        case "wlora_plus":
            changed = not release
        case "rlora":
            changed = not release and method["draw"] != "at_start"
        case name:
            changed = name == "alora"
    return 2 if changed else 1


@dataclass
class GenerationOverrides:
    """What differs from the model's own `generation_config` when it writes summaries; null keeps the model's."""

    num_beams: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    length_penalty: float | None = None


@dataclass
class TaskConfig:
    """A benchmark: where its rows come from, how they are read and what is reported."""

    name: str = MISSING
    kind: str = MISSING
    benchmark: str = MISSING
    hub_id: str | None = None
    subset: str | None = None
    generator: str | None = None
    columns: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    primary_metric: str = MISSING
    epochs: float = MISSING
    batch_size: int = MISSING
    eval_batch_size: int = 64
    max_length: int = 128
    max_target_length: int | None = field(default=None, metadata=LATER)
    generation: GenerationOverrides = field(default_factory=GenerationOverrides, metadata=LATER)
    unanswerable: bool = field(default=False, metadata=LATER)
    stride: int | None = field(default=None, metadata=LATER)
    n_best: int | None = field(default=None, metadata=LATER)
    max_answer_length: int | None = field(default=None, metadata=LATER)
    train_rows: int | None = None
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    path: str | None = None
    revision: str = "main"
    preset: str | None = field(default=None, metadata=LATER)
    presets: dict[str, Any] = field(default_factory=dict, metadata=LATER)


@dataclass
class ModelConfig:
    """A pretrained model, or (`source: random`) an architecture with fixed random weights."""

    name: str = MISSING
    source: str = MISSING
    hub_id: str | None = None
    revision: str = "main"
    package: str | None = None
    sha256: str | None = None
    path: str | None = None
    head: str = field(default="fresh", metadata=LATER)
    gguf_file: str | None = field(default=None, metadata=LATER)
    quantization: str = field(default="none", metadata=LATER)
    architecture: dict[str, Any] = field(default_factory=dict)
    accumulation_steps: int | None = None
    k: int | None = None


@dataclass
class TrainConfig:
    """Everything about the training loop that has no short key of its own."""

    max_steps: int | None = None
    accumulation_steps: int | None = None
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    eval_every: int | None = None
    gradient_checkpointing: bool = False
    grow_batch: str = field(default="off", metadata=LATER)
    prefix_cache: str = field(default="off", metadata=LATER)
    prefix_cache_dtype: str = field(default="bf16", metadata=LATER)
    prefix_cache_gb: float = 8.0
    fsdp: bool = False
    checkpoint_every: int | None = None
    keep: int = 2
    keep_after: bool = False
    save_model: bool = False
    save_adapter: bool = True


@dataclass
class AdapterConfig:
    """Adapters to start from: a folder in PEFT's format, such as a run leaves behind.

    Attributes:
        path: the folder; null for the method's own initialisation.
        head: let the head start from the folder's, too.
        fingerprint: of the folder's content, filled in; where it is given already, another one is refused.
    """

    path: str | None = None
    head: bool = False
    fingerprint: str | None = None


@dataclass
class Config:
    """One run. The short keys at the top are the ones sweeps turn; a method's YAML interpolates those it reads."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05
    lr: Any = 5e-4  # a float, or "tuned" until `wlora.analysis.tuning.fill_tuned`
    head_lr: Any = None  # a float, None for lr, or "tuned"
    warmup: Any = None  # an int or None, or "tuned"
    tune_on: str | None = None
    seed: int = 0
    k: int | None = None
    targets: str = "qkv"
    precision: str = "auto"
    compat: str = "paper"
    results_dir: str = "results"
    track: str = "none"
    offline: bool = False
    dry_run: bool = False
    force: bool = False
    experiment: str | None = None
    per_task: dict[str, Any] = field(default_factory=dict)


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
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "conf"


def scientific_fields(config: Config, *, task_data: str | None, model_data: str | None, precision: str) -> dict[str, Any]:
    """Collect what decides the numbers of a run, and nothing else (no path, device or logging).

    Args:
        config: a resolved configuration.
        task_data: content fingerprint of local or generated data, None for the hub.
        model_data: content fingerprint of local weights, None for the hub.
        precision: the precision chosen for this machine, never `auto`.
    """
    task, model, train = (_identifying(section) for section in (config.task, config.model, config.train))
    for key in ("path", "eval_batch_size", "generator", "train_rows") + (
        ("hub_id", "subset", "revision") if task_data else ()
    ):
        del task[key]
    for key in ("path", "package", "sha256", "accumulation_steps", "k"):
        del model[key]
    if model_data:
        for key in ("name", "source", "hub_id", "revision", "architecture"):
            del model[key]
        model.pop("gguf_file", None)
    for key in ("eval_every", "gradient_checkpointing", "fsdp", "checkpoint_every", "keep", "keep_after", "prefix_cache_gb"):
        del train[key]
    stored = train.pop("prefix_cache", "off"), train.pop("prefix_cache_dtype", config.train.prefix_cache_dtype)
    if stored[0] != "off":
        train["prefix_cache"] = stored[1]  # in memory or on disk is the same
    for key in ("save_model", "save_adapter"):
        del train[key]
    start = {"adapter": {"data": config.adapter.fingerprint, "head": config.adapter.head}} if config.adapter.path else {}
    return {
        **start,
        **({} if config.head_lr is None else {"head_lr": config.head_lr}),
        "version": RUN_ID_VERSION,
        "task": {**task, "data": task_data},
        "model": {**model, "data": model_data},
        "method": _identifying_method(config.method),
        "train": train,
        "lr": config.lr,
        "warmup": config.warmup,
        "seed": config.seed,
        "compat": config.compat,
        "precision": precision,
    }


def _identifying(section: TaskConfig | ModelConfig | TrainConfig) -> dict[str, Any]:
    """Return a section's keys, those `later` ones left out that hold their default."""
    kind: Any = type(section)
    later, values = _later_defaults(kind), dataclasses.asdict(section)
    return {key: value for key, value in values.items() if key not in later or value != later[key]}


@functools.cache
def _later_defaults(kind: Any) -> dict[str, Any]:
    added = {field.name for field in dataclasses.fields(kind) if field.metadata == LATER}
    return {key: value for key, value in dataclasses.asdict(kind()).items() if key in added}


def _identifying_method(method: dict[str, Any]) -> dict[str, Any]:
    """Return a method's keys, those added later left out that stand for what there was before."""
    later = METHOD_LATER.get(method["name"], {})
    return {key: value for key, value in method.items() if key not in later or value != later[key]}


def run_id(fields: dict[str, Any]) -> str:
    """Return the identity of a run: 16 hex digits of the SHA-256 of its scientific fields as canonical JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stream_seed(seed: int, stream: str) -> int:
    """Return a 63-bit seed for one named random stream of a run.

    The streams `init`, `order`, `dropout` and `choice` are independent: drawing more from one never moves
    another, so two methods on one seed share initialisation and data order.
    """
    digest = hashlib.sha256(f"wlora/{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
