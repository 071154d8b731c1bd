"""Benchmarks against PEFT and transformers' Trainer. All ratios compare measurements of one run on one machine.

    python scripts/benchmark.py steps [--repeats 3] [--models minilm deberta bart llama] [--times 1]
    python scripts/benchmark.py packs [--repeats 10] [--models minilm deberta] [--sizes 1 4 8 16]
    python scripts/benchmark.py graphs [--repeats 20] [--models minilm deberta bart llama]
    python scripts/benchmark.py memory [--batches 32 64]
    python scripts/benchmark.py end_to_end --data DIR [--baseline FILE] [--tasks sst2 mrpc] [--seeds 0 1 2] [--epochs 5]

`steps` times single optimiser steps of PEFT's LoRA, our LoRA, and WeightLoRA before and after its cut. After the cut, it is
timed without and with a stored prefix, and with a micro-batch that is enlarged to use the freed memory. The precisions are
float32 and the low precision for which the hardware has fast products (for PEFT by autocast, if the model supports it). The
contenders take turns, and medians are reported. Batches contain no padding. `--times` multiplies the batch size.
`operations` is the number of operations dispatched in a step. `time_to_limit` is the ratio of a step's time to the time of
its matrix products at the rate of a large product, measured here. With one thread on a CPU (OMP_NUM_THREADS=1), times are
those of the processor, so that other processes do not count.

`packs` times steps of packed runs and of a single run, and counts the operations dispatched per run
(`scripts/benchmark_packs.py`).

`graphs` times steps with CUDA graphs (`train.compile=graphs`), the same steps without them, and PEFT's; it needs CUDA.
`memory` compares the peak memory of a GPU with what the paper's authors measured (`scripts/benchmark_memory.py`).

`end_to_end` trains whole runs (`scripts/benchmark_runs.py`) with MiniLM on MRPC and SST-2 (4,000 rows). PEFT with Trainer
uses three kinds of batches: padded to 128 tokens, random, and grouped by length. The ratio to the last kind,
`time_to_grouped`, is the fair one, because this project groups rows by length, too. DIR contains mrpc/ and sst2/.

All of them use the GPU if there is one, and write JSON and a table to --out [results/benchmarks].
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_limits import count_operations, count_products, product_rate, time_step
from benchmark_memory import AUTHORS, measure_memory
from benchmark_packs import MODELS, time_packs
from benchmark_runs import DEVICE, TASKS, fast_precision, refuse_others, time_runs
from torch import Tensor, nn

from wlora.cli.sweep import compose
from wlora.config.schema import Config
from wlora.experiment.build import assemble, prepare_method
from wlora.models import written_attention
from wlora.models.deberta_attention import restore_attention
from wlora.models.discovery import layout_of
from wlora.models.first_token import first_token_alone
from wlora.models.heads import head_parameters
from wlora.models.prefix_forward import Prefix, frozen_depth
from wlora.storage.environment import describe_environment, name_machine
from wlora.training.activation_memory import activation_bytes, build_example, make_batch, saved_bytes
from wlora.training.graphs import Graphs, has_graphs
from wlora.training.optimizers import Optimizers
from wlora.training.precision import Precision, lower_base

# Untimed steps at the beginning: on a GPU, the first steps select kernels and fill the allocator.
FAST = "train.fast_step=true"
# Steps before the clock: on a GPU the first ones choose kernels and fill the allocator.
WARM_UP = 5 if DEVICE.type == "cuda" else 1


@dataclass(frozen=True)
class Case:
    """A model, the size of its micro-batch, and the adapters that a cut keeps, as a pattern of module names."""

    words: tuple[str, ...]
    rows: int
    tokens: int
    kept: str

    def words_of(self, method: str) -> list[str]:
        """Return the command-line arguments of a run with a method."""
        size = [f"task.batch_size={self.rows}", f"task.max_length={self.tokens}"]
        target = ["task.max_target_length=64"] if "task=xsum" in self.words else []
        return [*self.words, *size, *target, f"method={method}", "rank=8"]


# For DeBERTaV3-base, the adapters that the paper's release keeps; for the others, five in the highest layers.
CASES = {
    "minilm": Case(("task=mrpc", "model=minilm"), 32, 53, r"\.4\..*\.(key|value)|\.5\..*\.(query|key|value)"),
    "deberta": Case(("task=rte", "model=deberta_v3_base"), 32, 64, r"\.(8|10|11)\..*\.value_|\.11\..*\.(query|key)_"),
    "bart": Case(("task=xsum", "model=bart_large"), 8, 64, r"decoder\.layers\.11\.(self_attn\.(q|v)|encoder_attn\..)_proj"),
    "llama": Case(("task=sst2", "model=smollm2_135m"), 16, 48, r"\.28\..*\.(q|v)_proj|\.29\."),
}


@dataclass
class Contender:
    """A model and method whose steps are timed.

    Attributes:
        step: function that takes one step.
        rows: rows of the batch.
        saved: bytes saved for the backward pass.
        memory: bytes of weights, gradients, moments and temporary tensors of a step.
    """

    name: str
    precision: str
    step: Callable[[], object]
    rows: int
    saved: int
    memory: int
    seconds: list[float] = dataclasses.field(default_factory=list)


def main() -> None:
    """Run the benchmark given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    steps = kinds.add_parser("steps")
    steps.add_argument("--repeats", type=int, default=3)
    steps.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    steps.add_argument("--times", type=int, default=1)
    whole = kinds.add_parser("end_to_end")
    whole.add_argument("--data", type=Path, required=True)
    whole.add_argument(
        "--baseline",
        type=Path,
        default=Path(__file__).with_name("peft_baseline.py"),
        help="a script that takes the same options",
    )
    whole.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    whole.add_argument("--epochs", type=float, default=5)
    whole.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    packs = kinds.add_parser("packs")
    packs.add_argument("--repeats", type=int, default=10)
    packs.add_argument("--warm-up", type=int, default=WARM_UP)
    packs.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    packs.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 8, 16])
    graphs = kinds.add_parser("graphs")
    graphs.add_argument("--repeats", type=int, default=20)
    graphs.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    memory = kinds.add_parser("memory")
    memory.add_argument("--batches", type=int, nargs="+", choices=sorted(AUTHORS), default=sorted(AUTHORS))
    for kind in (steps, packs, whole, graphs, memory):
        kind.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(DEVICE.type, "as named", 1)
    if args.kind == "end_to_end":
        refuse_others(args.out, name_machine(environment))
    time_kind: dict[str, Callable[[argparse.Namespace], Iterable[dict[str, Any]]]]
    time_kind = {
        "steps": time_steps,
        "packs": time_packs,
        "end_to_end": time_runs,
        "graphs": time_graphs,
        "memory": measure_memory,
    }
    if args.kind == "graphs" and not has_graphs(DEVICE):
        content: dict[str, Any] = {"environment": environment, "skipped": "it needs CUDA", "rows": []}
        (args.out / "graphs.json").write_text(json.dumps(content, indent=1) + "\n")
        print("graphs: skipped, it needs CUDA")
        return
    found = list(time_kind[args.kind](args))
    content = {"environment": environment, "threads": torch.get_num_threads(), "rows": found}
    (args.out / f"{args.kind}.json").write_text(json.dumps(content, indent=1) + "\n")
    table = as_table(found)
    (args.out / f"{args.kind}.md").write_text(table)
    print(table)


def time_graphs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time steps without and with recordings in the fast precision; ratios of time are to PEFT's LoRA."""
    precision = fast_precision()
    plans = [("LoRA", "lora", False), ("WLoRA before the cut", "wlora", False), ("WLoRA cut", "wlora", True)]
    for name in args.models:
        contenders = [build_peft(CASES[name], precision), *build_stages(CASES[name], precision, plans)]
        contenders += build_stages(CASES[name], precision, plans, recorded=True)
        _take_turns(contenders, args.repeats)
        peft = statistics.median(contenders[0].seconds)
        for contender in contenders:
            seconds = statistics.median(contender.seconds)
            row = {"model": name, "what": contender.name, "precision": precision, "ms": round(1000 * seconds, 2)}
            yield row | {"batch": f"{contender.rows}×{CASES[name].tokens}", "time_to_peft": round(seconds / peft, 3)}


def _take_turns(contenders: list[Contender], repeats: int) -> None:
    for _ in range(WARM_UP):
        for contender in contenders:
            contender.step()
    for _ in range(repeats):
        for contender in contenders:
            contender.seconds.append(time_step(contender.step))


def time_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time steps of every model. Time ratios are per row, relative to PEFT's LoRA and to the same contender in float32."""
    rows: list[dict[str, Any]] = []
    precisions = dict.fromkeys(["fp32", fast_precision()])
    for name in args.models:
        case = dataclasses.replace(CASES[name], rows=args.times * CASES[name].rows)
        contenders = []
        for precision in precisions:
            try:
                contenders.append(build_peft(case, precision))
            except RuntimeError as error:
                print(f"{name}, PEFT LoRA, {precision}: {error}", file=sys.stderr)
            contenders += build_ours(case, precision)
        _take_turns(contenders, args.repeats)
        per_row = {(c.name, c.precision): statistics.median(c.seconds) / c.rows for c in contenders}
        saved = {(c.name, c.precision): c.saved for c in contenders}
        for contender in contenders:
            seconds = per_row[contender.name, contender.precision]
            peft, single = ("PEFT LoRA", contender.precision), (contender.name, "fp32")
            rows.append(
                {
                    "model": name,
                    "what": contender.name,
                    "precision": contender.precision,
                    "batch": f"{contender.rows}×{case.tokens}",
                    "ms": round(1000 * seconds * contender.rows, 1),
                    "examples_per_s": round(1 / seconds, 1),
                    "tokens_per_s": round(case.tokens / seconds),
                    "saved_mib": round(contender.saved / 2**20, 1),
                    "memory_mib": round(contender.memory / 2**20, 1),
                    "time_to_peft": round(seconds / per_row[peft], 3) if peft in per_row else None,
                    "time_to_peft_fp32": round(seconds / per_row["PEFT LoRA", "fp32"], 3),
                    "time_to_own_fp32": round(seconds / per_row[single], 3) if single in per_row else None,
                    "saved_to_peft": round(contender.saved / saved[peft], 3) if peft in saved else None,
                    "operations": count_operations(contender.step),
                    "time_to_limit": round(seconds * contender.rows / limit(contender), 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def limit(contender: Contender) -> float:
    """Return the seconds that the matrix products of a contender's step would take at the rate of a large one."""
    return count_products(contender.step) / product_rate(contender.precision)


def build_model(config: Config) -> tuple[Any, dict[str, Tensor]]:
    """Build a model with random weights, whose cost equals that of trained ones, and a full batch without padding."""
    torch.manual_seed(0)
    model = build_example(config, str(DEVICE))
    return model.train(), make_batch(model, config)


def build_peft(case: Case, precision: str) -> Contender:
    """Build PEFT's LoRA on the same modules with the same head. Steps are as in Trainer: autocast, clip, AdamW, schedule.

    Raises:
        RuntimeError: the model does not support autocast.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import get_linear_schedule_with_warmup

    model, batch = build_model(compose(case.words_of("lora")))
    restore_attention(model)  # use transformers' own attention
    written_attention.restore_attention(model)
    stacks = layout_of(model).stacks
    suffixes = sorted({suffix.rpartition(".")[2] for stack in stacks for suffix in stack.qkv})
    head = sorted({name.split(".")[0] if "pooler" not in name else "pooler" for name in head_parameters(model)})
    adapted = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=suffixes, modules_to_save=head or None)
    ).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    schedule = get_linear_schedule_with_warmup(optimizer, 10, 1000)

    def lowered() -> torch.autocast:
        return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        with lowered():
            loss = adapted(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    with lowered():
        saved, memory = measure(adapted, batch)
    return Contender("PEFT LoRA", precision, step, case.rows, saved, memory)


def measure(model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Return the bytes saved for the backward pass, and the total of a step with weights, gradients and AdamW's moments."""
    held = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
    saved = saved_bytes(model, batch)
    if DEVICE.type == "cpu":
        return saved, saved + held
    memory = activation_bytes(model, batch) + held
    model.zero_grad()
    return saved, memory


def build_ours(case: Case, precision: str) -> list[Contender]:
    """Build our LoRA, and WeightLoRA before the cut, after the cut, with a stored prefix, and with a larger micro-batch.

    LoRA and WeightLoRA after the cut are also built with `train.fast_step`.
    """
    found = build_stages(case, precision, [("LoRA", "lora", False), ("WLoRA before the cut", "wlora", False)])
    found += build_stages(case, precision, [("LoRA, fast", "lora", False), ("WLoRA cut, fast", "wlora", True)], FAST)
    found += build_stages(case, precision, [("WLoRA cut", "wlora", True)])
    # Like `train.grow_batch`: combine as many micro-batches as fit into the memory of one before the cut.
    growth = found[1].saved // found[-1].saved
    if growth > 1:
        grown = dataclasses.replace(case, rows=growth * case.rows)
        found.append(build_stages(grown, precision, [("WLoRA cut", "wlora", True)])[-1])
        found[-1].name = f"{found[-1].name}, micro-batch grown"
    return found


def build_stages(
    case: Case, precision: str, plans: list[tuple[str, str, bool]], *words: str, recorded: bool = False
) -> list[Contender]:
    """Build contenders from (name, method, whether it has cut), with more `words`. After a cut, also one with the prefix.

    With `recorded`, their passes are recorded as CUDA graphs, and their names say so.
    """
    ending = ", graphs" if recorded else ""
    found = []
    for name, method, cut in plans:
        ours = compose([*case.words_of(method), "k=5", *words])
        model, batch = build_model(ours)
        policy = prepare_method(ours, None)
        assemble(ours, model, policy)
        if cut:
            for adapter in policy.adapters:
                if not re.search(case.kept, adapter):
                    policy.adapters.disconnect(adapter)
            assert len(policy.adapters) == 5, list(policy.adapters)
        lower_base(model, Precision(precision, ""))
        groups = policy.groups(1e-4)
        groups[0].parameters += list(head_parameters(model).values())
        optimizers = Optimizers(groups, weight_decay=0.01)
        found.append(_contender(name + ending, precision, model, batch, optimizers, None, recorded))
        if cut:
            prefix = Prefix(model, frozen_depth(model))
            name = f"{name}, prefix of {prefix.depth} stored"
            found.append(_contender(name + ending, precision, model, batch, optimizers, prefix, recorded))
    return found


def _contender(
    name: str,
    precision: str,
    model: Any,
    batch: dict[str, Tensor],
    optimizers: Optimizers,
    prefix: Prefix | None,
    recorded: bool,
) -> Contender:
    graphs = Graphs() if recorded else None
    states = prefix.compute(batch) if prefix else None

    def replaced() -> contextlib.AbstractContextManager[None]:
        return prefix.replaced(states) if prefix and states is not None else contextlib.nullcontext()

    def backward(given: dict[str, Tensor]) -> Tensor:
        loss: Tensor = model(**given).loss
        torch.autograd.backward(loss)
        return loss.detach()

    def step() -> None:
        optimizers.set_schedule(10, warmup=10, total=1000)
        with first_token_alone(model), replaced():
            if graphs:
                graphs.begin(0)
                graphs.run(batch, backward, optimizers.parameters)
            else:
                backward(batch)
        optimizers.clip(1.0)
        optimizers.step()
        optimizers.zero_grad()

    with first_token_alone(model), replaced():
        saved, memory = measure(model, batch)
    return Contender(name, precision, step, len(batch["input_ids"]), saved, memory)


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return rows with the same keys as a Markdown table."""
    keys = list(rows[0])
    lines = [keys, ["---"] * len(keys), *(["–" if row[key] is None else str(row[key]) for key in keys] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
