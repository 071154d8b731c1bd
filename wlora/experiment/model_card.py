"""The model card (README.md) of an exported model, generated from its record, with metadata for the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wlora.config.schema import Config
from wlora.models.architectures import NAMED_HEADS
from wlora.storage.records import Record
from wlora.tasks.base import find_kind

_CLASSES = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
_ROWS_SHOWN = 100


def write_card(file: Path, record: Record, config: Config, *, merged: bool) -> None:
    """Write the model card of an exported run, either a merged model or an adapter of a base."""
    task, model, method = config.task, config.model, record.config["method"]
    head = {
        "library_name": "transformers" if merged else "peft",
        "base_model": model.hub_id if model.source == "hub" and record.config["model"]["path"] is None else None,
        "datasets": [task.hub_id] if task.hub_id and record.config["task"]["path"] is None else None,
        "tags": list(dict.fromkeys(["wlora", method["name"], *([] if merged else ["lora"])])),
    }
    # JSON is valid YAML, and it escapes special characters.
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items() if value)
    parts = [
        f"---\n{front}\n---",
        f"# {model.name} on {task.name} by {method['name']}",
        _introduction(record, config, merged=merged),
        _usage(record, config, merged=merged),
        f"## Scores\n\nOn the dev set, {_moment(config)}. If settings were tuned, they were tuned on this same set.\n\n"
        + _table(("metric", "dev set"), _scores(record)),
        "## Parameters\n\n" + _table(("what", "elements"), list(record.parameters.items())),
        "## Adapters\n\n" + _adapters(record),
        "## Training\n\n" + _table(("", ""), _training(record)),
    ]
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _introduction(record: Record, config: Config, *, merged: bool) -> str:
    model, task = config.model, config.task
    base = record.config["model"]
    if base["path"] is None and base["source"] == "hub":
        named = f"`{model.hub_id}` at revision `{record.model.get('revision') or model.revision}`"
    elif base["source"] == "random" and base["path"] is None:
        named = f"`{model.name}`, a model of random weights for tests"
    else:
        named = f"a local `{model.name}` (content `{record.model.get('fingerprint')}`)"
    what = "The adapters are folded into the weights: this is a plain transformers model" if merged else "An adapter"
    data = f"content or revision `{record.task.get('data')}`, {record.task.get('train_rows')} training rows"
    labels = f" Labels, in the order of the logits: {', '.join(task.labels)}." if task.labels else ""
    return f"{what} of {named}, trained on {task.name} ({data}). Run `{record.run_id}` of wlora.{labels}"


def _usage(record: Record, config: Config, *, merged: bool) -> str:
    head = find_kind(config.task.kind).head
    name = _CLASSES[head]
    if merged:
        lines = [f"from transformers import {name}", f'model = {name}.from_pretrained("DIR")']
    else:
        classes = f", id2label={dict(enumerate(config.task.labels))}" if config.task.labels else ", num_labels=1"
        labels = classes if head in NAMED_HEADS else ""
        revision = f', revision="{record.model["revision"]}"' if record.model.get("revision") else ""
        base = config.model.hub_id if config.model.source == "hub" and config.model.path is None else "BASE"
        lines = [
            f"from transformers import {name}",
            "from peft import PeftModel",
            f'base = {name}.from_pretrained("{base}"{revision}{labels})',
            'model = PeftModel.from_pretrained(base, "DIR")  # also loads the trained head',
        ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _moment(config: Config) -> str:
    if config.train.best is None:
        return "after the last step; nothing was chosen by an earlier evaluation"
    return f"at the evaluation with the best {config.train.best}, which was chosen on this same set"


def _scores(record: Record) -> list[tuple[str, Any]]:
    reported = record.primary_metric
    names = [reported, *(name for name in record.metrics if name != reported)]
    return [(f"**{name}**" if name == reported else name, f"{record.metrics[name]:.4f}") for name in names]


def _adapters(record: Record) -> str:
    """Return a table of ω and rank of every adapter in training. In the exported files, ω is multiplied into B."""
    rows = [(f"`{a['name']}`", "" if a["omega"] is None else f"{a['omega']:.4f}", a["rank"]) for a in record.adapters]
    left = f"\n\n… and {len(rows) - _ROWS_SHOWN} more." if len(rows) > _ROWS_SHOWN else ""
    return (
        f"{len(rows)}; ω is folded into B.\n\n"
        + _table(("module", "ω in training", "rank in training"), rows[:_ROWS_SHOWN])
        + left
    )


def _training(record: Record) -> list[tuple[str, Any]]:
    config, environment = record.config, record.environment
    method = {key: value for key, value in config["method"].items() if key != "name"}
    packages = environment.get("packages", {})
    return [
        ("method", config["method"]["name"]),
        *((f"method.{key}", value) for key, value in method.items()),
        ("learning rate", config["lr"]),
        ("seed", config["seed"]),
        ("optimiser steps", record.steps.get("total")),
        ("warm-up", record.steps.get("warmup")),
        ("batch", f"{config['task']['batch_size']} × {config['train']['accumulation_steps']}"),
        ("compat", config["compat"]),
        ("precision of the base", environment.get("precision")),
        ("device", environment.get("device")),
        ("seconds", f"{record.seconds.get('total', 0):.0f}"),
        ("wlora", f"{environment.get('wlora')}, commit {environment.get('git_commit')}"),
        (
            "packages",
            ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft") if name in packages),
        ),
    ]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
