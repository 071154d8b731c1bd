"""Peak memory beside that of the paper's authors: the part `memory` of `scripts/benchmark.py`.

Their peaks are of DeBERTaV3-base on MNLI padded to 128 tokens, rank 8 on query, key and value, float32, with the first k
adapters from the bottom. They are with transformers' own attention, which saves more than this project's
(`wlora.models.deberta_attention`). Weights are random here, because memory does not depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from benchmark_runs import DEVICE

from wlora.cli.memory import peak_bytes
from wlora.cli.sweep import compose
from wlora.experiment.build import assemble, prepare_method
from wlora.experiment.memory_estimate import estimate
from wlora.methods.base import Steps
from wlora.models.first_token import first_token_alone
from wlora.training.activation_memory import build_example, make_batch
from wlora.training.precision import Precision

# Peak GiB by rows of a batch and connected adapters, measured by the paper's authors.
AUTHORS = {32: {1: 6.23, 20: 6.64, 36: 6.92}, 64: {1: 11.74, 20: 12.53, 36: 13.06}}
WORDS = ["task=mnli", "model=deberta_v3_base", "targets=qkv", "rank=8", "task.max_length=128"]


def measure_memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each batch and number of adapters: GiB of the authors, of `dry_run`, and the peak of this GPU.

    `dry_run` estimates a cut to the k lowest adapters, which have no other trained weights. Without CUDA there is no peak.
    """
    for batch in args.batches:
        model = None
        for k, authors in AUTHORS[batch].items():
            config = compose(
                [*WORDS, f"task.batch_size={batch}", *(["method=wlora", f"k={k}"] if k < 36 else ["method=lora"])]
            )
            told = estimate(config, Precision("fp32", ""), Steps(total=1000, per_epoch=500))[-1].total
            peak = None
            if DEVICE.type == "cuda":
                if model is None:
                    plain = compose([*WORDS, f"task.batch_size={batch}", "method=lora"])
                    method, model = prepare_method(plain, None), build_example(plain, str(DEVICE))
                    assemble(plain, model, method, Precision("fp32", ""))
                    inputs, names = make_batch(model.train(), plain), list(method.adapters)
                with method.adapters.only(names[:k]), first_token_alone(model):
                    peak = peak_bytes(model, inputs)
            yield {
                "batch": f"{batch}×128",
                "adapters": k,
                "authors_gib": authors,
                "dry_run_gib": round(told / 2**30, 2),
                "peak_gib": None if peak is None else round(peak / 2**30, 2),
                "peak_to_dry_run": None if peak is None else round(peak / told, 3),
                "peak_to_authors": None if peak is None else round(peak / 2**30 / authors, 3),
            }
        del model
        torch.cuda.empty_cache()
