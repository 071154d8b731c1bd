"""Speed and memory beside PEFT and transformers' Trainer, in one run on one machine. Every figure is a ratio within it.

    python scripts/benchmark.py steps [--repeats 3] [--models minilm deberta bart llama] [--times 1]
    python scripts/benchmark.py end_to_end --data DIR [--baseline FILE] [--tasks sst2 mrpc] [--seeds 0 1 2] [--epochs 5]

`steps` times single optimiser steps of PEFT's LoRA, our LoRA, and WeightLoRA before and after its cut, without and with a
stored prefix, and with the micro-batch grown into the freed memory; in float32, and in the low precision that the GPU or
processor multiplies fast (PEFT's by autocast, where the model survives it). All take turns, and medians count. Batches are
full, so tokens are unpadded ones; `--times` makes every batch so many times larger.

`end_to_end` trains whole runs on MRPC and SST-2 (4,000 rows) with MiniLM in the precision that is fast here, warm-up, cut
and the filling of the cache included; runs that are done are not repeated, and those of another machine are refused. Seconds
are of training, evaluations apart. The target of `to_target_s` is one point of accuracy below the mean of PEFT's final
scores; it counts from the start of training to the end of the first epoch that reaches it. DIR holds mrpc/ and sst2/.

Both run on the GPU if there is one, and write JSON and a table to --out [results/benchmarks].
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wlora.cli.sweep import compose
from wlora.config.schema import Config
from wlora.experiment.run import attach, prepare_method
from wlora.models.architectures import FAMILIES
from wlora.models.deberta_attention import restore_attention
from wlora.models.first_token import first_token_alone
from wlora.models.heads import head_parameters
from wlora.models.prefix_forward import Prefix, frozen_depth
from wlora.models.source import locate
from wlora.storage.environment import describe_environment, name_machine
from wlora.storage.records import RecordStore
from wlora.training.activation_memory import activation_bytes, build_example, make_batch, saved_bytes
from wlora.training.optimizers import Optimizers
from wlora.training.precision import Precision, choose_precision, lower_base

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    whole.add_argument("--baseline", type=Path, default=Path(__file__).with_name("peft_baseline.py"))
    whole.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    whole.add_argument("--epochs", type=float, default=5)
    whole.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    for kind in (steps, whole):
        kind.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(DEVICE.type, "as named", 1)
    if args.kind == "end_to_end":
        refuse_others(args.out, name_machine(environment))
    found = time_steps(args) if args.kind == "steps" else time_runs(args)
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
                synchronize()
                begin = time.perf_counter()
                contender.step()
                synchronize()
                contender.seconds.append(time.perf_counter() - begin)
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
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def fast_precision() -> str:
    """Return what `precision=auto` chooses here."""
    return choose_precision("auto", DEVICE).name


def synchronize() -> None:
    """Wait for what the GPU has been given to do."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


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
    stacks = FAMILIES[model.config.model_type]
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
    """Our LoRA, WeightLoRA before the cut, after it, after it with the prefix stored, and then with more rows at once."""
    found = build_stages(case, precision, [("LoRA", "lora", False), ("WLoRA before the cut", "wlora", False)])
    found += build_stages(case, precision, [("WLoRA cut", "wlora", True)])
    # As `train.grow_batch` does: as many micro-batches at once as one took before the cut.
    growth = found[1].saved // found[-1].saved
    if growth > 1:
        grown = dataclasses.replace(case, rows=growth * case.rows)
        found.append(build_stages(grown, precision, [("WLoRA cut", "wlora", True)])[-1])
        found[-1].name = f"{found[-1].name}, micro-batch grown"
    return found


def build_stages(case: Case, precision: str, plans: list[tuple[str, str, bool]]) -> list[Contender]:
    """Build contenders: a name, a method, and whether it has cut; of one that has, without and with stored prefix."""
    found = []
    for name, method, cut in plans:
        ours = compose([*case.words_of(method), "k=5"])
        model, batch = build_model(ours)
        policy = prepare_method(ours)
        attach(model, policy, ours)
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


# Every run of `end_to_end`: its name, and its words for `wlora.cli.run`.
RUNS = {
    "LoRA": ["method=lora"],
    "WLoRA": ["method=wlora", "k=5"],
    "WLoRA, prefix": ["method=wlora", "k=5", "train.prefix_cache=memory"],
    "WLoRA depth, prefix": ["method=wlora_depth", "k=5", "train.prefix_cache=memory"],
}
TASKS = {"sst2": ["task.max_train_rows=4000"], "mrpc": []}


@dataclass(frozen=True)
class Outcome:
    """A finished training.

    Attributes:
        seconds: of training, evaluations apart.
        score: accuracy on the dev set.
        trained: parameters that train in the end, those of the head included.
        peak: bytes.
        curve: (seconds, accuracy) after every epoch.
    """

    seconds: float
    score: float
    trained: int
    peak: int | None
    curve: list[tuple[float, float]]

    def seconds_to(self, target: float) -> float | None:
        """Return the training seconds up to the first epoch that reached a score."""
        return next((seconds for seconds, score in self.curve if score >= target), None)


def refuse_others(out: Path, machine: str) -> None:
    """Stop where a folder holds runs of another machine: a ratio of their seconds would be none."""
    found = {name_machine(record.environment) for record in RecordStore(out / "runs")}
    found |= {json.loads(file.read_text())["machine"] for file in (out / "peft").glob("*.json")}
    if others := sorted(found - {machine}):
        raise SystemExit(f"error: --out {out} holds runs of {', '.join(others)}, and this is {machine}: take another folder")


def time_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train everything once per seed in turn; seconds are of training, scores of the whole dev set."""
    rows: list[dict[str, Any]] = []
    for task in args.tasks:
        limits = TASKS[task]
        found: dict[str, list[Outcome]] = {}
        for seed in args.seeds:
            found.setdefault("PEFT + Trainer", []).append(_run_peft(args, task, seed))
            for name, words in RUNS.items():
                found.setdefault(name, []).append(_run_ours(args, task, [*limits, *words, f"seed={seed}"]))
            print(
                task, seed, {name: (round(runs[-1].seconds, 1), runs[-1].score) for name, runs in found.items()}, flush=True
            )
        base = found["PEFT + Trainer"]
        target = statistics.mean(run.score for run in base) - 0.01
        for name, runs in found.items():
            ratios = [run.seconds / other.seconds for run, other in zip(runs, base, strict=True)]
            reached = [seconds for run in runs if (seconds := run.seconds_to(target)) is not None]
            peaks = [run.peak for run in runs if run.peak is not None]
            rows.append(
                {
                    "task": task,
                    "what": name,
                    "precision": fast_precision(),
                    "seeds": len(runs),
                    "train_s": round(statistics.median(run.seconds for run in runs), 1),
                    "time_to_peft": round(statistics.median(ratios), 3),
                    "trained": round(statistics.mean(run.trained for run in runs)),
                    "mean_accuracy": round(statistics.mean(run.score for run in runs), 4),
                    "target": round(target, 4),
                    "to_target_s": round(statistics.median(reached), 1) if reached else None,
                    "reached": f"{len(reached)} of {len(runs)}",
                    "peak_mib": round(statistics.median(peaks) / 2**20) if peaks else None,
                }
            )
    return rows


def _run_peft(args: argparse.Namespace, task: str, seed: int) -> Outcome:
    """Run the baseline script, or read what it has said before."""
    file = args.out / "peft" / f"{task}_{args.epochs:g}_{fast_precision()}_{seed}.json"
    if not file.exists():
        model = compose(["model=minilm", f"task={task}"]).model
        words = [sys.executable, str(args.baseline), "--model", str(locate(model).location), "--task", task]
        words += ["--data", str(args.data / task), "--epochs", str(args.epochs), "--lr", "1e-3", "--seed", str(seed)]
        words += ["--bf16"] if fast_precision() == "bf16" else []
        words += ["--train-rows", "4000"] if task == "sst2" else []
        said_last = _call(words).strip().splitlines()[-1]
        file.parent.mkdir(parents=True, exist_ok=True)
        machine = name_machine(describe_environment(DEVICE.type, fast_precision(), 1))
        file.write_text(json.dumps({"machine": machine, **json.loads(said_last)}) + "\n")
    said = json.loads(file.read_text())
    peak = said.get("peak_mb" if DEVICE.type == "cuda" else "peak_rss_mb")
    return Outcome(said["train_s"], said["score"], said["trainable"], peak and peak * 2**20, said.get("curve", []))


def _run_ours(args: argparse.Namespace, task: str, words: list[str]) -> Outcome:
    """Run one setting in a process of its own, unless its record is there."""
    common = ["model=minilm", f"task={task}", f"task.path={args.data / task}", f"precision={fast_precision()}", "lr=1e-3"]
    common += ["warmup=20", "task.batch_size=32", "train.accumulation_steps=1", f"task.epochs={args.epochs:g}"]
    common += [f"results_dir={args.out / 'runs'}", "train.save_adapter=false", *words]
    printed = _call([sys.executable, "-m", "wlora.run", *common])
    (identity,) = set(re.findall(r"^([0-9a-f]{16})(?:: task=| is done)", printed, flags=re.MULTILINE))
    store = RecordStore(args.out / "runs")
    record = store.read(identity)
    assert record is not None
    scores = {point["step"]: point["metrics"]["accuracy"] for point in store.read_curve(record) if "metrics" in point}
    curve = [(point["seconds"], scores[int(point["step"])]) for point in record.evaluations]
    peak = record.memory.get("device", record.memory.get("process"))
    trained = record.parameters["adapter_final"] + record.parameters["head"]
    return Outcome(record.seconds["train"], record.metrics["accuracy"], trained, peak, curve)


def _call(words: list[str]) -> str:
    """Run a command; returns what it prints, or stops with what it says is wrong."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: {shlex.join(words)} ended with {done.returncode}\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return rows with the same keys as a Markdown table."""
    keys = list(rows[0])
    lines = [keys, ["---"] * len(keys), *(["–" if row[key] is None else str(row[key]) for key in keys] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
