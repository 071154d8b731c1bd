"""Types of the content of records, restricted to the parts that readers use. Older records lack some keys."""

from __future__ import annotations

from typing import Any, TypedDict

from wlora.config.schema import Config


class Adapter(TypedDict):
    """A kept adapter: module name, weight ω (None for methods without ω) and rank."""

    name: str
    omega: float | None
    rank: int


class _Happened(TypedDict):
    step: int
    kind: str


class Event(_Happened, total=False):
    """A change of the adapter structure during training. `omega` and `ranks` are keyed by module name."""

    kept: list[str]
    omega: dict[str, float]
    ranks: dict[str, int]
    adapter: str
    value: float


class Environment(TypedDict, total=False):
    """The environment of a run (`wlora.storage.environment`)."""

    wlora: str
    git_commit: str | None
    git_dirty: bool | None
    packages: dict[str, str]
    torch: dict[str, Any]
    variables: dict[str, str]
    overrides: list[str]
    processor: str | None
    precision: str
    device: str


class Task(TypedDict, total=False):
    """The data of a run."""

    name: str
    version: str | None
    data: str | None
    train_rows: int


class Model(TypedDict, total=False):
    """The initial weights of a run, and the adapters that it saved."""

    name: str
    fingerprint: str | None
    revision: str | None
    adapter: str | None
    adapter_config: str | None


class Method(TypedDict, total=False):
    """The keys of methods that readers use."""

    name: str
    rank: int
    k: int | None
    targets: str
    schedule: str
    select_steps: int | None


class Chosen(TypedDict, total=False):
    """Keys of the configuration with type `Any` in the schema; in a record, `tuned` has been replaced by a number."""

    method: Method
    lr: float
    head_lr: float | None
    warmup: int | None


class Content(TypedDict, total=False):
    """Types of the parts of a record that `wlora.storage.records.Record` does not declare precisely."""

    config: Config
    task: Task
    model: Model
    adapters: list[Adapter]
    events: list[Event]
    environment: Environment


class _Scored(TypedDict):
    step: int


class Point(_Scored, total=False):
    """A point of a learning curve."""

    loss: float
    epoch: float
    metrics: dict[str, float]


class Parameters(TypedDict):
    """Parameter counts of a finished run."""

    adapter_initial: int
    adapter_final: int
    base: int
    head: int
    total: int


class Seconds(TypedDict):
    """Durations of a finished run in seconds."""

    train: float
    total: float


class Batch(TypedDict):
    """Keys of `train` that are always filled in before a run starts."""

    accumulation_steps: int


class Resolved(TypedDict):
    """Parts of the configuration that every run has."""

    task: dict[str, Any]
    model: dict[str, Any]
    method: dict[str, Any]
    train: Batch
    lr: float
    seed: int
    rank: int


class Finished(TypedDict):
    """Parts that every record of a successful run has."""

    config: Resolved
    parameters: Parameters
    seconds: Seconds
