"""What a user reads: what is about to run, how it ended, and the streams that carry it. Imports no torch by itself."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from wlora.distributed import first_time
from wlora.errors import ConfigError, RunFault, as_fault

if TYPE_CHECKING:
    from wlora.config.schema import Config
    from wlora.methods.base import Method
    from wlora.storage.records import Record
    from wlora.training.precision import Precision
    from wlora.training.run_length import Plan


def protect_output() -> None:
    """Make sure that nothing printed can end a run. Every entry point and every process of a launcher calls this first.

    It covers what libraries print, too: Hydra's help, the progress bar, warnings and tracebacks.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Output):
            # A process that was started with the stream closed has none.
            setattr(sys, name, _Output(stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")))


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """End the command where the block fails in a way that users meet: a line or two, and the exit code."""
    told: ConfigError | RunFault | None
    try:
        yield
        return
    except (ConfigError, RunFault) as error:
        told = error
    except Exception as error:
        told = as_fault(error)
        if told is None:
            raise
    print(f"error: {told}", file=sys.stderr)
    sys.exit(told.exit_code)


class _Output:
    """A text stream that shows `?` for a character that its encoding lacks, and that ignores a reader who has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: Any = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, act: Callable[..., object], *values: str) -> None:
        try:
            act(*values)
        except (OSError, ValueError):
            # A closed pipe, a full disk. What is still buffered must go somewhere, or Python complains at exit.
            with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor, or none to be had
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def put(text: str, stream: TextIO | None = None) -> None:
    """Print lines in one piece: those of processes that share a stream, such as a launcher's, do not run into each other."""
    stream = stream or sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def say(text: str) -> None:
    """Print for the user, on the main process only."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        put(text)


def notice(text: str) -> None:
    """Print a notice for the user, once per command: the runs of a sweep repeat theirs."""
    if first_time(text):
        say(f"notice: {text}")


def announce(config: Config, identity: str, plan: Plan, precision: Precision) -> None:
    """Say what is about to run, and which default was changed."""
    say(
        f"{identity}: task={config.task.name} model={config.model.name} method={config.method['name']} seed={config.seed}, "
        f"{plan.total_steps} steps of {plan.batch_size}×{plan.accumulation_steps} rows, "
        f"{precision.name} ({precision.reason})"
    )
    if plan.notice:
        notice(plan.notice)


def share_of_model(trainable: int, counts: dict[str, int]) -> str:
    """Say which share of the model trains: of its own elements and, where they are adapters, of all with them.

    Of a packed model also of the elements that it is stored in. The paper's percentages are of all for BART-large, and
    of the stored for Llama (methods note §0.3).
    """
    shares = [f"{trainable / counts['total']:.3%} of {counts['total']:,}"]
    if counts["stored"] != counts["total"]:
        shares.append(f"{trainable / counts['stored']:.3%} of {counts['stored']:,} stored")
    if trainable and not counts["base"]:
        shares.append(f"{trainable / (counts['stored'] + trainable):.3%} with them counted in")
    return ", ".join(shares)


def summarize(record: Record, method: Method, path: str) -> str:
    """Format the end of a run: metric, parameters, kept adapters, seconds, where the record is."""
    counts = record.parameters
    first, last = (counts["base"] + counts[key] for key in ("adapter_initial", "adapter_final"))
    kept = [f"{a['name']} (ω {a['omega']:.3f}, rank {a['rank']})" for a in record.adapters if a["omega"] is not None]
    metrics = ", ".join(_show(name, record.metrics) for name in record.metrics if not name.endswith(("_low", "_high")))
    shares = share_of_model(last, counts)
    lines = [
        f"metric     {metrics} (dev set)",
        f"trainable  {first:,} -> {last:,} ({shares}), head {counts['head']:,}",
        f"kept       {len(record.adapters)} adapters"
        + (f", lowest in layer {method.adapters.lowest_layer}" if kept else ""),
        *(f"           {line}" for line in kept[:20]),
        *_show_prefix(record.memory),
        f"seconds    {record.seconds['train']:.1f} training, {record.seconds['eval']:.1f} evaluation, "
        f"{record.seconds['total']:.1f} in all ({record.throughput['examples_per_second']:.0f} examples/s)",
        f"record     {path}",
    ]
    return "\n".join(lines)


def _show_prefix(memory: dict[str, int]) -> list[str]:
    """Say what a run left out, if it did."""
    if "prefix_layers" not in memory:
        return []
    layers, rows, size = (memory[f"prefix_{key}"] for key in ("layers", "rows", "bytes"))
    return [f"prefix     lowest {layers} layers left out in the end, {rows:,} rows stored ({size / 2**20:.0f} MiB)"]


def _show(name: str, metrics: dict[str, float]) -> str:
    """Format one metric, with its interval where it has one."""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
    return f"{name} {metrics[name]:.4f}{interval}"
