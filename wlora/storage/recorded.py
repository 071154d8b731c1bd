"""What stands in a record, by type: what readers of records rely on, and no more. Older records lack keys."""

from __future__ import annotations

from typing import Any, TypedDict

from wlora.config.schema import Config


class Adapter(TypedDict):
    """An adapter that was kept: its module, ω (None where there is none) and rank."""

    name: str
    omega: float | None
    rank: int


class _Happened(TypedDict):
    step: int
    kind: str


class Event(_Happened, total=False):
    """A change of structure: ω and ranks are by the names of modules."""

    kept: list[str]
    omega: dict[str, float]
    ranks: dict[str, int]
    adapter: str
    value: float


class Environment(TypedDict, total=False):
    """Where a run ran (`wlora.storage.environment`)."""

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
    """The data that a run read."""

    name: str
    version: str | None
    data: str | None
    train_rows: int


class Model(TypedDict, total=False):
    """The weights that a run started from, and the adapters that it left."""

    name: str
    fingerprint: str | None
    revision: str | None
    adapter: str | None
    adapter_config: str | None


class Method(TypedDict, total=False):
    """The keys of methods that readers look at."""

    name: str
    rank: int
    k: int | None
    targets: str
    schedule: str
    select_steps: int | None


class Chosen(TypedDict, total=False):
    """Keys of the configuration that its schema leaves open; `tuned` has become a number by then."""

    method: Method
    lr: float
    head_lr: float | None
    warmup: int | None


class Content(TypedDict, total=False):
    """The parts of a record whose types `wlora.storage.records.Record` does not tell."""

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
    """The counts of every finished run."""

    adapter_initial: int
    adapter_final: int
    base: int
    head: int
    total: int


class Seconds(TypedDict):
    """The times of every finished run."""

    train: float
    total: float


class Batch(TypedDict):
    """What is filled in before a run begins."""

    accumulation_steps: int


class Resolved(TypedDict):
    """What of its configuration no run lacks."""

    task: dict[str, Any]
    model: dict[str, Any]
    method: dict[str, Any]
    train: Batch
    lr: float
    seed: int
    rank: int


class Finished(TypedDict):
    """What no record of a run that succeeded lacks."""

    config: Resolved
    parameters: Parameters
    seconds: Seconds
