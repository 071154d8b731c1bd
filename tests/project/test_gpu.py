"""The runner on a GPU, in processes of its own: what a CPU cannot show. Skipped where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import GPUS, ROOT, TINY
from tests.support.conf_files import METHODS
from wlora.storage.records import Record, RecordStore

pytestmark = pytest.mark.integration

DROPOUT = {name: ["hidden_dropout_prob", "attention_probs_dropout_prob"] for name in ("tiny_bert", "tiny_deberta")}
DROPOUT["tiny_bart"] = ["dropout"]

WITHOUT_WAITS = """
import sys, torch
from wlora.cli import run
from wlora.experiment import run as experiment
from wlora.training import trainer as loop

def guarded(before):
    def guard(trainer, *given):
        # Step 1 checks the optimiser's groups; step 8 is that of the cut, which the host decides.
        torch.cuda.set_sync_debug_mode("default" if trainer.step + 1 in (1, 8) else "error")
        try:
            return before(trainer, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return guard

experiment.compute_gradients = guarded(experiment.compute_gradients)
loop.Trainer._take_step, loop.CURVE_POINTS = guarded(loop.Trainer._take_step), 1
sys.argv[0] = "wlora.cli.run"
run.main()
"""


def python(*words: str, hidden: bool = False) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "" if hidden else GPUS}
    if env["CUDA_VISIBLE_DEVICES"] == "all":
        del env["CUDA_VISIBLE_DEVICES"]
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    """Skip all without a GPU; asked here and not on import, which every process of the suite does."""
    check = "import torch; assert torch.cuda.is_available()"
    if torch.version.cuda is None or python("-c", check).returncode != 0:
        pytest.skip("there is no GPU")


def run(results: Path, *words: str, hidden: bool = False) -> list[Record]:
    done = python("-m", "wlora.run", "-m", *TINY, f"results_dir={results}", *words, hidden=hidden)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return list(RecordStore(results))


def test_every_method_trains_and_is_saved(tmp_path: Path) -> None:
    methods = [name for name in METHODS if name != "nora"]  # its frame is wider than a tiny model
    for record in (records := run(tmp_path, f"method={','.join(methods)}", "rank=4")):
        assert record.environment["device"].startswith("cuda") and record.memory["device"] > 0
        adapted = record.parameters["adapter_final"] > 0
        assert adapted == (tmp_path / "adapters" / record.run_id / "adapter_model.safetensors").is_file()
    assert len(records) == len(methods)


def test_a_run_repeats_bit_for_bit(tmp_path: Path) -> None:
    (first,), (again,) = (run(tmp_path / folder, "method=wlora", "train.prefix_cache=memory") for folder in "ab")
    assert (first.run_id, first.metrics, first.curve) == (again.run_id, again.metrics, again.curve)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_deberta", "tiny_llama", "tiny_bart"])
def test_float32_agrees_with_the_cpu(tmp_path: Path, model: str) -> None:
    words = [f"model={model}", "method=rlora", "k=2", "seed=4", "precision=fp32", "dropout=0", "task.epochs=1"]
    words += ["train.prefix_cache=memory", "train.prefix_cache_dtype=fp32"]
    words += [f"++model.architecture.{name}=0" for name in DROPOUT.get(model, [])]
    (here,) = run(tmp_path / "gpu", *words)
    (there,) = run(tmp_path / "cpu", *words, hidden=True)
    assert here.metrics["loss"] == pytest.approx(there.metrics["loss"], rel=1e-3)
    assert [a["name"] for a in here.adapters] == [a["name"] for a in there.adapters]


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_deberta", "tiny_llama", "tiny_bart"])
def test_recorded_passes_agree_with_others(tmp_path: Path, model: str) -> None:
    """Through a cut and with stored states; the recordings of before it are not replayed behind it."""
    words = [f"model={model}", "method=rlora", "k=2", "seed=4", "precision=fp32", "dropout=0", "train.prefix_cache=memory"]
    words += [f"++model.architecture.{name}=0" for name in DROPOUT.get(model, [])]
    (recorded,) = run(tmp_path / "graphs", *words, "train.compile=graphs")
    (other,) = run(tmp_path / "off", *words)
    assert recorded.memory["graphs"] >= 2 and recorded.memory["graph_passes"] > 0 and "graphs" not in other.memory
    assert recorded.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-3)
    assert [a["name"] for a in recorded.adapters] == [a["name"] for a in other.adapters]


def test_recorded_dropout_repeats_bit_for_bit(tmp_path: Path) -> None:
    first, again = (run(tmp_path / folder, "method=wlora", "dropout=0.1", "train.compile=graphs")[0] for folder in "ab")
    assert first.memory["graph_passes"] > 0 and (first.metrics, first.curve) == (again.metrics, again.curve)


def test_batches_grow_by_measured_memory(tmp_path: Path) -> None:
    words = ["method=wlora", "k=1", "train.grow_batch=micro", "train.accumulation_steps=4", "task.epochs=4"]
    (record,) = run(tmp_path, *words, "task.batch_size=32", "task.max_train_rows=512")
    (grown,) = [event for event in record.events if event["kind"] == "grow_batch"]
    assert grown["bytes_before"] > grown["bytes_after"] > 0 and record.memory["device"] >= grown["bytes_before"]


@pytest.mark.parametrize("method", ["wlora", "wlora_depth", "rlora"])
def test_a_step_does_not_wait_for_the_gpu(tmp_path: Path, method: str) -> None:
    """DeBERTa in bfloat16: transformers' own BERT, BART and Llama look at their mask in every pass."""
    words = ["model=tiny_deberta", f"method={method}", "k=2", "method.select_steps=8", "precision=bf16"]
    done = python("-c", WITHOUT_WAITS, *TINY, *words, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (record,) = RecordStore(tmp_path)
    assert [event["step"] for event in record.events] == [8]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_bases_train(tmp_path: Path, kind: str) -> None:
    (record,) = run(tmp_path, "model=tiny_llama", "method=wlora", "k=2", f"model.quantization={kind}")
    assert record.status == "success" and record.parameters["stored"] < record.parameters["total"]
