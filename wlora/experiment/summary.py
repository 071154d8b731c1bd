"""Messages for the user at the start and the end of a run."""

from __future__ import annotations

from wlora.config.schema import Config
from wlora.console import notice, say
from wlora.methods.base import Method
from wlora.metrics.classes import format_classes
from wlora.storage.records import Record
from wlora.training.precision import Precision
from wlora.training.run_length import Plan


def announce(config: Config, identity: str, plan: Plan, precision: Precision) -> None:
    """Print a line about the run that starts, and a notice if a default was adjusted."""
    say(
        f"{identity}: task={config.task.name} model={config.model.name} method={config.method['name']} seed={config.seed}, "
        f"{plan.total_steps} steps of {plan.batch_size}×{plan.accumulation_steps} rows, "
        f"{precision.name} ({precision.reason})"
    )
    if plan.notice:
        notice(plan.notice)


def share_of_model(trainable: int, counts: dict[str, int]) -> str:
    """Format the share of trained parameters: of the base model, and for adapters also of base and adapters together.

    For quantised models, also report the share of stored elements. The paper's percentages refer to base and adapters
    together for BART-large (Table 5), and to the stored elements of a 4-bit base for Llama 3 8B (Table 3).
    """
    shares = [f"{trainable / counts['total']:.3%} of {counts['total']:,}"]
    if counts["stored"] != counts["total"]:
        shares.append(f"{trainable / counts['stored']:.3%} of {counts['stored']:,} stored")
    if trainable and not counts["base"]:
        shares.append(f"{trainable / (counts['stored'] + trainable):.3%} including the adapters")
    return ", ".join(shares)


def summarize(record: Record, method: Method, path: str) -> str:
    """Format the summary of a finished run: metric, parameters, kept adapters, seconds, path of the record."""
    counts = record.parameters
    first, last = (counts["base"] + counts[key] for key in ("adapter_initial", "adapter_final"))
    kept = [f"{a['name']} (ω {a['omega']:.3f}, rank {a['rank']})" for a in record.adapters if a["omega"] is not None]
    metrics = ", ".join(_show(name, record.metrics) for name in record.metrics if not name.endswith(("_low", "_high")))
    shares = share_of_model(last, counts)
    lines = [
        f"metric     {metrics} (dev set)",
        *_show_ending(record),
        *(f"{'' if number else 'classes':10} {line}".rstrip() for number, line in enumerate(format_classes(record.classes))),
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


def _show_ending(record: Record) -> list[str]:
    """Return lines about the evaluation that `train.best` chose and the stop by `train.patience`; none by default."""
    lines = []
    for event in record.events:
        if event["kind"] == "best":
            lines.append(f"best       {event['metric']} after step {event['step']} (train.best)")
        elif event["kind"] == "stopped":
            lines.append(f"stopped    after step {event['step']} of {record.steps['total']} (train.patience)")
    return lines


def _show_prefix(memory: dict[str, int]) -> list[str]:
    """Return a line about the layers skipped by the prefix cache; empty if it was not used."""
    if "prefix_layers" not in memory:
        return []
    layers, rows, size = (memory[f"prefix_{key}"] for key in ("layers", "rows", "bytes"))
    return [f"prefix     lowest {layers} layers skipped at the end, {rows:,} rows cached ({size / 2**20:.0f} MiB)"]


def _show(name: str, metrics: dict[str, float]) -> str:
    """Format one metric, with its interval if it has one."""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
    return f"{name} {metrics[name]:.4f}{interval}"
