"""The metrics against numbers computed by hand, in one process and in two."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.conftest import ROOT
from wlora.errors import ConfigError, RunFault
from wlora.metrics.glue import Shard, compute, merge_shards, metrics_of

ALL_OF_CLASSES = ["accuracy", "f1", "macro_f1", "weighted_f1", "matthews", "accuracy_f1"]
ALL_OF_VALUES = ["pearson", "spearman", "corr"]


def test_class_metrics_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    predictions = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    references = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    found = compute(ALL_OF_CLASSES, predictions, references)
    f1, other = 2 * 3 / (2 * 3 + 1 + 2), 2 * 4 / (2 * 4 + 2 + 1)
    averaged = {"macro_f1": (f1 + other) / 2, "weighted_f1": (5 * f1 + 5 * other) / 10}
    matthews = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert list(found) == ALL_OF_CLASSES
    assert found == pytest.approx(
        {"accuracy": 0.7, "f1": f1, "matthews": matthews, "accuracy_f1": (0.7 + f1) / 2} | averaged
    )
    assert all(type(value) is float for value in found.values())


def test_f1_is_that_of_class_one() -> None:
    assert compute(["f1"], np.array([0, 0, 1]), np.array([0, 0, 1]))["f1"] == 1.0
    assert compute(["f1"], np.array([0, 0, 0]), np.array([0, 0, 1]))["f1"] == 0.0


def test_accuracy_of_three_classes() -> None:
    assert compute(["accuracy"], np.array([0, 1, 2, 2]), np.array([0, 1, 2, 0])) == {"accuracy": 0.75}


def test_mean_f1_of_three_classes_by_hand() -> None:
    found = compute(["macro_f1", "weighted_f1"], np.array([0, 0, 1, 0]), np.array([0, 0, 1, 2]))
    # 4 / 5 of class 0 (twice), 1 of class 1 (once) and 0 of class 2 (once), which is never predicted
    assert found == pytest.approx({"macro_f1": (4 / 5 + 1 + 0) / 3, "weighted_f1": (2 * 4 / 5 + 1 + 0) / 4})


def test_each_number_of_classes_has_its_metrics() -> None:
    assert metrics_of(2) == ALL_OF_CLASSES and metrics_of(0) == ALL_OF_VALUES
    assert metrics_of(3) == ["accuracy", "macro_f1", "weighted_f1", "matthews"]


def test_correlations_by_hand() -> None:
    predictions, references = np.array([1.0, 2.0, 3.0, 5.0], dtype=np.float32), np.array([1.0, 3.0, 2.0, 4.0])
    found = compute(ALL_OF_VALUES, predictions, references)
    # deviations from the means 2.75 and 2.5: sums of products 5.5, of squares 8.75 and 5
    pearson = 5.5 / math.sqrt(8.75 * 5)
    # one pair of ranks is swapped: 1 - 6 * (1 + 1) / (4 * 15)
    spearman = 0.8
    assert found == pytest.approx({"pearson": pearson, "spearman": spearman, "corr": (pearson + spearman) / 2})


def test_spearman_gives_ties_their_mean_rank() -> None:
    found = compute(["spearman"], np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: sums of products 4.5, of squares 4.5 and 5
    assert found["spearman"] == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman", "corr"])
@pytest.mark.parametrize("references", [[0, 1, 0, 1], [0, 0, 0, 0]])
def test_a_constant_prediction_scores_zero(name: str, references: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compute([name], np.zeros(4, dtype=np.int64), np.array(references))
    assert found == {name: 0.0}


@pytest.mark.parametrize("name", ALL_OF_CLASSES + ALL_OF_VALUES)
def test_one_row_is_no_error(name: str) -> None:
    value = compute([name], np.array([1]), np.array([1]))[name]
    assert math.isfinite(value)


def test_a_prediction_that_is_nan_is_not_hidden() -> None:
    assert math.isnan(compute(["pearson"], np.array([1.0, float("nan"), 2.0]), np.array([1.0, 2.0, 3.0]))["pearson"])


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean accuracy"):
        compute(["acuracy"], np.array([1]), np.array([1]))


def test_metrics_write_nothing(tmp_path: Path) -> None:
    # A home below a file cannot be written to, even by the superuser.
    home = tmp_path / "file"
    home.touch()
    code = (
        "import numpy as np; from wlora.metrics.glue import compute;"
        "print(compute(['accuracy', 'corr'], np.array([0, 1]), np.array([0, 1])))"
    )
    places = {name: str(home / "x") for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME")}
    environment = {**places, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "{'accuracy': 1.0, 'corr': 1.0}", done.stderr
    assert list(tmp_path.iterdir()) == [home]


def test_shards_of_any_size_and_order_are_merged() -> None:
    shards: list[Shard] = [([4, 0], ["e", "a"]), ([2], ["c"]), ([], []), ([3, 1], ["d", "b"])]
    assert merge_shards(shards, count=5) == ["a", "b", "c", "d", "e"]


def test_features_that_padding_doubled_count_once() -> None:
    assert merge_shards([([0, 2], np.array([5, 7])), ([1, 0], np.array([6, 5]))], count=3) == [5, 6, 7]


@pytest.mark.parametrize(("count", "missing"), [(5, 2), (6, 3)])
def test_missing_features_are_counted(count: int, missing: int) -> None:
    with pytest.raises(RunFault, match=f"^{missing} of {count} evaluation features"):
        merge_shards([([0, 2, 4], np.zeros(3))], count=count)


def test_nothing_predicted_at_all_is_a_fault() -> None:
    with pytest.raises(RunFault):
        merge_shards([([], [])], count=1)


def _rows() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.RandomState(1)
    references = generator.randint(0, 2, size=23)
    return np.where(generator.rand(23) < 0.3, 1 - references, references), references


def _score_on_a_share(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    predictions, references = _rows()
    mine = np.arange(0, 16) if rank == 0 else np.array([*range(16, 23), 0])
    gathered: list[Shard | None] = [None, None]
    dist.all_gather_object(gathered, (mine.tolist(), predictions[mine]))
    merged = merge_shards([shard for shard in gathered if shard is not None], count=23)
    found = compute(["f1", "matthews"], np.asarray(merged), references)
    Path(folder, f"{rank}.txt").write_text(repr(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path: Path) -> None:
    mp.spawn(_score_on_a_share, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    alone = repr(compute(["f1", "matthews"], *_rows()))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [alone, alone]
