"""Entry point: `python -m wlora.memory model=deberta_v3_base`, memory of a training step by connected adapters (Figure 3).

The arguments are overrides of a run's configuration: model, task, targets, rank, precision, `task.batch_size` and
`task.max_length`. The weights are random, because memory does not depend on their values. The command writes
`<results_dir>/memory/<name>.json`, which `python -m wlora.figures memory` draws.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from wlora.analysis.study_reader import read_runs
from wlora.cli.entry import serve
from wlora.cli.sweep import compose
from wlora.config.schema import Config
from wlora.data.own_tables import require_source
from wlora.errors import wrong_value
from wlora.experiment.build import Assembly, assemble, prepare_method
from wlora.models.architectures import read_architecture
from wlora.models.first_token import first_token_alone
from wlora.models.targets import list_targets
from wlora.storage.atomic_write import check_folders, write_whole
from wlora.storage.environment import describe_environment
from wlora.storage.sealing import seal
from wlora.tasks.base import find_kind
from wlora.training.activation_memory import build_example, make_batch, saved_bytes
from wlora.training.precision import choose_precision, has_accelerator

# Number of steps between zero adapters and all adapters at which memory is measured.
STOPS = 12


USAGE = """\
usage: python -m wlora.memory key=value ...

Measures the memory of a training step by the number of connected adapters and writes <results_dir>/memory/NAME.json, which
python -m wlora.figures memory draws.

  model=NAME  task=NAME  targets=SET  rank=N  precision=NAME  task.batch_size=N  task.max_length=N  results_dir=DIR"""


def main(words: Sequence[str] | None = None) -> None:
    """Measure one setting and print the path of the results. Exit code 2 for a wrong request."""
    serve(lambda given: print(write(compose(given))), USAGE, words)


def write(config: Config) -> Path:
    """Measure one setting, write the results and return their path."""
    require_source(config.task)
    task, n = config.task, len(_target_names(config))
    name = f"{config.model.name}_{config.targets}_r{config.rank}_{task.batch_size}x{task.max_length}"
    if not re.fullmatch(r"[\w.-]{1,100}", config.model.name):
        raise wrong_value(
            "model.name", config.model.name, "at most 100 letters, digits, dots and dashes (it is used in a file name)"
        )
    check_folders(config.results_dir, "memory")
    file = Path(config.results_dir) / "memory" / f"{name}.json"
    device = Accelerator(cpu=not has_accelerator()).device
    precision = choose_precision(config.precision, device)
    config.method = {"name": "lora", "rank": config.rank, "alpha": config.alpha, "dropout": config.dropout}
    method = prepare_method(config, None)
    assembly = assemble(config, build_example(config, str(device)), method, precision)
    environment = describe_environment(str(device), precision.name, 1)
    setting = {"model": config.model.name, "targets": config.targets, "rank": config.rank, "n": n}
    setting |= {"batch_size": task.batch_size, "length": task.max_length, "environment": environment}
    content = {**setting, "points": measure(assembly, config, selections(config))}
    write_whole(file, seal(content).encode())
    return file


def _target_names(config: Config) -> list[str]:
    head = find_kind(config.task.kind).head
    return [target.name for target in list_targets(read_architecture(config.model), config.targets, head)]


def selections(config: Config) -> dict[str, list[str]]:
    """Return the sets of adapters to measure. Keys are an order and a number of adapters, such as `lowest first 5`.

    The orders are `lowest first` and `highest first` (by layer) and `as selected`. `as selected` is measured for every K of
    the study's `wlora` runs with this model and target set; it contains the K adapters that these runs kept most often.
    """
    names = _target_names(config)
    counts = sorted({1, *(round(len(names) * stop / STOPS) for stop in range(STOPS + 1))})
    found = {f"lowest first {count}": names[:count] for count in counts}
    found |= {f"highest first {count}": names[len(names) - count :] for count in counts}
    runs = read_runs(config.results_dir) if os.path.isdir(config.results_dir) else []
    mine = [run for run in runs if (run.model, run.method, run.status) == (config.model.name, "wlora", "success")]
    for k in sorted({run.k for run in mine if run.k is not None and run.setting["method.targets"] == config.targets}):
        kept = Counter(adapter["name"] for run in mine if run.k == k for adapter in run.record.adapters)
        chosen = {name for name, _ in kept.most_common(k)}
        found[f"as selected {k}"] = [name for name in names if name in chosen]
    return found


def measure(assembly: Assembly, config: Config, sets: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Measure a training step with each set of adapters connected.

    Returns:
        For each set: `order`; `connected`, the number of adapters; `saved_bytes`, the exact size of the tensors that
        autograd saves for the backward pass, on any device; and `peak_bytes`, the peak memory of the GPU over one step with
        AdamW (None without a GPU).
    """
    model, adapters = assembly.model.train(), assembly.method.adapters
    batch = make_batch(model, config)
    points = []
    for label, names in sets.items():
        with adapters.only(names), first_token_alone(model):
            bytes_of = {"saved_bytes": saved_bytes(model, batch), "peak_bytes": peak_bytes(model, batch)}
        points.append({"order": label.rpartition(" ")[0], "connected": len(names), **bytes_of})
    return points


def peak_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int | None:
    """Return the peak GPU memory of one training step with AdamW in bytes; None without a GPU."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return None
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return int(torch.cuda.max_memory_allocated(device))
