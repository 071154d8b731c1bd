"""What one would run without this project: PEFT's LoRA under transformers' Trainer, on one GLUE task.

    python scripts/peft_baseline.py --model DIR --data DIR/mrpc --task mrpc --epochs 3

Rank 8 on query, key and value, alpha 32, dropout 0.05, pooler and classifier trained: the work of `method=lora`. Prints
one JSON line: score (accuracy), train_s (seconds of training, evaluation apart), examples_per_s, peak_rss_mb (of the
process) or peak_mb (of the GPU), trainable parameters, and curve: training seconds and accuracy after every epoch.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

TEXT_COLUMNS = {
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "rte": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
}
# Rows padded to 128 tokens (as by run_glue.py), random batches padded to their longest row, rows of like length together.
BATCHES = ("padded", "random", "grouped")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--task", required=True, choices=sorted(TEXT_COLUMNS))
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--train-rows", type=int, default=None, help="so many training rows, drawn at random")
    parser.add_argument("--batches", choices=BATCHES, default="grouped", help="how batches are made")
    return parser.parse_args()


def load_data(args: argparse.Namespace, tokenizer: Any) -> Any:
    """Return the encoded splits."""
    from datasets import load_dataset

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [rows[column] for column in TEXT_COLUMNS[args.task]]
        padding = "max_length" if args.batches == "padded" else False
        return dict(tokenizer(*texts, truncation=True, max_length=128, padding=padding))

    files = {name: str(args.data / f"{name}.parquet") for name in ("train", "validation")}
    data = load_dataset("parquet", data_files=files).map(encode, batched=True)
    if args.train_rows:
        data["train"] = data["train"].shuffle(seed=0).select(range(args.train_rows))
    return data


def load_model(args: argparse.Namespace) -> Any:
    """Return the model with PEFT's adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2, dtype=torch.float32)
    adapters = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["query", "key", "value"],
        modules_to_save=["pooler", "classifier"],
    )
    return get_peft_model(model, adapters)


def train(args: argparse.Namespace, model: Any, data: Any, tokenizer: Any) -> dict[str, Any]:
    """Train and evaluate after every epoch; returns what there is to print of it."""
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    class TimedTrainer(Trainer):  # type: ignore[misc]
        """Evaluates after every epoch, beside the clock."""

        begin = 0.0
        evaluating = 0.0
        curve: list[tuple[float, float]] = []

        def evaluate(self, *words: Any, **options: Any) -> dict[str, float]:
            start = time.perf_counter()
            found: dict[str, float] = super().evaluate(*words, **options)
            self.curve.append((start - self.begin - self.evaluating, found["eval_accuracy"]))
            self.evaluating += time.perf_counter() - start
            return found

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length" if args.batches == "grouped" else "random",
            warmup_steps=20,
            seed=args.seed,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),  # without it bf16 is refused where there is no GPU
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            label_names=["labels"],
        )
        trainer = TimedTrainer(
            model=model,
            args=settings,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        )
        trainer.begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - trainer.begin - trainer.evaluating
    rows = len(data["train"]) * args.epochs
    return {"score": trainer.curve[-1][1], "train_s": seconds, "examples_per_s": rows / seconds, "curve": trainer.curve}


def main() -> None:
    """Train, evaluate, print."""
    args = parse()
    import torch
    from transformers import AutoTokenizer, set_seed

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_data(args, tokenizer)
    model = load_model(args)
    result = train(args, model, data, tokenizer)
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    result["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if torch.cuda.is_available():
        result["peak_mb"] = torch.cuda.max_memory_allocated() // 2**20
    print(json.dumps(result))


if __name__ == "__main__":
    main()
