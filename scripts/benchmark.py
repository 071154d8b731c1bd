"""Speed and memory beside PEFT and transformers' Trainer, in one run on one machine. Every figure is a ratio within it.

    python scripts/benchmark.py steps [--repeats 3] [--models minilm deberta bart llama] [--times 1]
    python scripts/benchmark.py packs [--repeats 10] [--models minilm deberta] [--sizes 1 4 8 16]
    python scripts/benchmark.py end_to_end --data DIR [--baseline FILE] [--tasks sst2 mrpc] [--seeds 0 1 2] [--epochs 5]

`steps` times single optimiser steps of PEFT's LoRA, our LoRA, and WeightLoRA before and after its cut, without and with a
stored prefix, and with the micro-batch grown into the freed memory; in float32, and in the low precision that the GPU or
processor multiplies fast (PEFT's by autocast, where the model survives it). All take turns, and medians count. Batches are
full, so tokens are unpadded ones; `--times` makes every batch so many times larger. `operations` are those dispatched in a
step; `time_to_limit` is the ratio to the time of the step's matrix products at the rate of a large one, measured here. With
one thread on a CPU (OMP_NUM_THREADS=1) the times are those of the processor: other processes beside do not count.

`packs` times steps of packed runs beside steps of a run alone, and counts the operations dispatched per run
(`scripts/benchmark_packs.py`).

`end_to_end` trains whole runs (`scripts/benchmark_runs.py`) with MiniLM on MRPC and SST-2 (4,000 rows). PEFT under Trainer
runs with each of its three forms of batches: padded to 128 tokens, random, and grouped by length. The ratio to the grouped
form, `time_to_grouped`, is the fair one, because this project groups rows by length too. DIR holds mrpc/ and sst2/.

Both run on the GPU if there is one, and write JSON and a table to --out [results/benchmarks].
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_limits import count_operations, count_products, product_rate, time_step
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
from wlora.training.optimizers import Optimizers
from wlora.training.precision import Precision, lower_base

FAST = "train.fast_step=true"
# Steps before the clock: on a GPU the first ones choose kernels and fill the allocator.
WARM_UP = 5 if DEVICE.type == "cuda" else 1


@dataclass(frozen=True)
class Case:
    """A model, the size of its micro-batch, and what a cut leaves: a pattern of module names."""

    words: tuple[str, ...]
    rows: int
    tokens: int
    kept: str

    def words_of(self, method: str) -> list[str]:
        """Return the overrides of a run with a method."""
        size = [f"task.batch_size={self.rows}", f"task.max_length={self.tokens}"]
        target = ["task.max_target_length=64"] if "task=xsum" in self.words else []
        return [*self.words, *size, *target, f"method={method}", "rank=8"]


# Of DeBERTaV3-base what the paper's release keeps; of the others five in the highest layers.
CASES = {
    "minilm": Case(("task=mrpc", "model=minilm"), 32, 53, r"\.4\..*\.(key|value)|\.5\..*\.(query|key|value)"),
    "deberta": Case(("task=rte", "model=deberta_v3_base"), 32, 64, r"\.(8|10|11)\..*\.value_|\.11\..*\.(query|key)_"),
    "bart": Case(("task=xsum", "model=bart_large"), 8, 64, r"decoder\.layers\.11\.(self_attn\.(q|v)|encoder_attn\..)_proj"),
    "llama": Case(("task=sst2", "model=smollm2_135m"), 16, 48, r"\.28\..*\.(q|v)_proj|\.29\."),
}


@dataclass
class Contender:
    """Something whose steps are timed.

    Attributes:
        step: takes one.
        rows: of its batch.
        saved: bytes kept for its backward pass.
        memory: bytes of weights, gradients, moments and what comes and goes in a step.
    """

    name: str
    precision: str
    step: Callable[[], object]
    rows: int
    saved: int
    memory: int
    seconds: list[float] = dataclasses.field(default_factory=list)


def main() -> None:
    """Run what the command line asks for."""
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
    for kind in (steps, packs, whole):
        kind.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(DEVICE.type, "as named", 1)
    if args.kind == "end_to_end":
        refuse_others(args.out, name_machine(environment))
    time_kind: dict[str, Callable[[argparse.Namespace], Iterable[dict[str, Any]]]]
    time_kind = {"steps": time_steps, "packs": time_packs, "end_to_end": time_runs}
    found = list(time_kind[args.kind](args))
    content = {"environment": environment, "threads": torch.get_num_threads(), "rows": found}
    (args.out / f"{args.kind}.json").write_text(json.dumps(content, indent=1) + "\n")
    table = as_table(found)
    (args.out / f"{args.kind}.md").write_text(table)
    print(table)


def time_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time steps of every model; ratios of time are per row, to PEFT's LoRA and to the same in float32."""
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
        for _ in range(WARM_UP):
            for contender in contenders:
                contender.step()
        for _ in range(args.repeats):
            for contender in contenders:
                contender.seconds.append(time_step(contender.step))
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
    """Build an architecture with random weights, which cost what trained ones cost, and a full batch without padding."""
    torch.manual_seed(0)
    model = build_example(config, str(DEVICE))
    return model.train(), make_batch(model, config)


def build_peft(case: Case, precision: str) -> Contender:
    """PEFT's LoRA on the same modules with the same head, stepped as Trainer steps it: autocast, clip, AdamW, schedule.

    Raises:
        RuntimeError: the model does not survive autocast.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import get_linear_schedule_with_warmup

    model, batch = build_model(compose(case.words_of("lora")))
    restore_attention(model)  # as transformers hands it out
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
    """Return the bytes kept for the backward pass, and with weights, gradients and AdamW's moments all of a step."""
    held = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
    saved = saved_bytes(model, batch)
    if DEVICE.type == "cpu":
        return saved, saved + held
    memory = activation_bytes(model, batch) + held
    model.zero_grad()
    return saved, memory


def build_ours(case: Case, precision: str) -> list[Contender]:
    """Our LoRA, WeightLoRA before the cut, after it, after it with the prefix stored, and then with more rows at once.

    LoRA and what is left after the cut are there with `train.fast_step`, too.
    """
    found = build_stages(case, precision, [("LoRA", "lora", False), ("WLoRA before the cut", "wlora", False)])
    found += build_stages(case, precision, [("LoRA, fast", "lora", False), ("WLoRA cut, fast", "wlora", True)], FAST)
    found += build_stages(case, precision, [("WLoRA cut", "wlora", True)])
    # As `train.grow_batch` does: as many micro-batches at once as one took before the cut.
    growth = found[1].saved // found[-1].saved
    if growth > 1:
        grown = dataclasses.replace(case, rows=growth * case.rows)
        found.append(build_stages(grown, precision, [("WLoRA cut", "wlora", True)])[-1])
        found[-1].name = f"{found[-1].name}, micro-batch grown"
    return found


def build_stages(case: Case, precision: str, plans: list[tuple[str, str, bool]], *words: str) -> list[Contender]:
    """Build contenders: a name, a method, and whether it has cut; of one that has, without and with stored prefix."""
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
        found.append(_contender(name, precision, model, batch, optimizers, None))
        if cut:
            prefix = Prefix(model, frozen_depth(model))
            name = f"{name}, prefix of {prefix.depth} stored"
            found.append(_contender(name, precision, model, batch, optimizers, prefix))
    return found


def _contender(
    name: str, precision: str, model: Any, batch: dict[str, Tensor], optimizers: Optimizers, prefix: Prefix | None
) -> Contender:
    states = prefix.compute(batch) if prefix else None

    def replaced() -> contextlib.AbstractContextManager[None]:
        return prefix.replaced(states) if prefix and states is not None else contextlib.nullcontext()

    def step() -> None:
        optimizers.set_schedule(10, warmup=10, total=1000)
        with first_token_alone(model), replaced():
            loss = model(**batch).loss
        loss.backward()
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
