"""The claims of the paper are judged by what the records say."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.support.synthetic import make_record
from wlora.analysis.examples import Predictions
from wlora.analysis.statistics import Difference
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tables.cells import fill
from wlora.analysis.tables.claims import Kind, Verdict, check_claims, judge
from wlora.analysis.tables.layouts import LAYOUTS
from wlora.cli.tables import main
from wlora.storage.records import RecordStore

NOISE = (0.000, 0.004, -0.003, 0.001, -0.002)


def runs(results: Path, method: str, task: str, score: float, *words: str, tilt: float = 0.1, **fields: object) -> None:
    """Write five seeds; `tilt` is the part of the noise that a method does not share with the others."""
    for seed, noise in enumerate(NOISE):
        value = score + noise + tilt * NOISE[-seed]
        make_record(results, f"method={method}", f"task={task}", f"seed={seed}", *words, metrics=value, **fields)  # type: ignore[arg-type]


def study(results: Path) -> None:
    for task in ("sst2", "rte"):
        runs(results, "lora", task, 0.80)
        runs(results, "wlora", task, 0.802, "k=5", tilt=0.3)
        runs(results, "rlora", task, 0.78, "k=5", tilt=0.2)
        runs(results, "wlora_plus", task, 0.78, "k=5", tilt=0.4)
    runs(results, "adalora", "sst2", 0.76, tilt=0.5)
    runs(results, "melora", "sst2", 0.80, tilt=3.0)


def lines(results: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((results / "tables" / f"{name}.csv").open(encoding="utf-8")))


def of(mean: float, half: float) -> Difference:
    """Return a difference whose 95 % interval is mean ± half."""
    found = Difference(mean, (5,), True, 1.0, 8.0)
    low, high = found.interval() or (0.0, 0.0)
    return Difference(mean, (5,), True, half / ((high - low) / 2), 8.0)


@pytest.mark.parametrize(
    ("kind", "mean", "half", "verdict"),
    [
        ("better", 1.0, 0.9, "holds"),
        ("better", 1.0, 1.1, "undecided"),
        ("better", -1.0, 0.9, "does not hold"),
        ("worse", -1.0, 0.9, "holds"),
        ("worse", 1.0, 0.9, "does not hold"),
        ("equivalent", 0.2, 0.7, "holds"),
        ("equivalent", 0.2, 0.9, "holds"),  # two one-sided tests ask for the 90 % interval, which is 0.73 on each side
        ("equivalent", 0.2, 1.2, "undecided"),
        ("equivalent", 2.0, 0.9, "does not hold"),
        ("equivalent", -2.0, 0.9, "does not hold"),
        ("at least", 0.5, 1.2, "holds"),
        ("at least", 3.0, 0.5, "holds"),
        ("at least", -0.5, 0.4, "does not hold"),
        ("at least", -0.5, 2.0, "undecided"),
    ],
)
def test_a_verdict_follows_from_the_interval(kind: Kind, mean: float, half: float, verdict: Verdict) -> None:
    assert judge(kind, of(mean, half)) == verdict


def test_one_pair_decides_nothing() -> None:
    assert judge("better", Difference(50.0, (1,), True)) == "undecided"


def test_every_claim_is_judged_per_task_and_over_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path)
    main(["claims", f"results_dir={tmp_path}"])
    assert "| WLoRA is better than RLoRA with as many adapters | 1 | WLoRA K=5 vs RLoRA K=5, r=8 | SST-2 | +2.20 [" in (
        capsys.readouterr().out
    )
    found = {(line["a"], line["b"], line["task"]): line for line in lines(tmp_path, "claims")}
    verdicts = {key: line["verdict"] for key, line in found.items()}
    assert verdicts == {
        **{("WLoRA K=5", "RLoRA K=5", task): "holds" for task in ("SST-2", "RTE", "all")},
        **{("WLoRA K=5", "LoRA", task): "holds" for task in ("SST-2", "RTE", "all")},
        **{("WLoRA+", "LoRA", task): "does not hold" for task in ("SST-2", "RTE", "all")},
        ("AdaLoRA", "LoRA", "SST-2"): "holds",
        ("MELoRA", "LoRA", "SST-2"): "undecided",
    }
    over = found["WLoRA K=5", "RLoRA K=5", "all"]
    assert float(over["difference"]) == pytest.approx(2.2) and over["pairs"] == "10" and over["tasks"] == "2"
    assert float(over["low"]) < 2.2 < float(over["high"]) and float(over["p"]) < 0.001
    page = (tmp_path / "tables" / "claims.md").read_text(encoding="utf-8")
    assert "IQM" in page and (tmp_path / "tables" / "claims.tex").read_text().count(r"\begin{tabular}") == 1


def test_a_common_rate_that_turns_the_order_is_named(tmp_path: Path) -> None:
    # At their own best rates WLoRA+ is ahead; at the rate that is best for LoRA it is behind.
    for lr, lora, plus in (("1e-3", 0.80, 0.82), ("3e-3", 0.81, 0.78)):
        for seed in (0, 1, 2, 100):
            make_record(tmp_path, "method=lora", "task=sst2", f"lr={lr}", f"seed={seed}", metrics=lora + seed / 1e5)
            make_record(tmp_path, "method=wlora_plus", "task=sst2", f"lr={lr}", f"seed={seed}", metrics=plus)
    main(["claims", f"results_dir={tmp_path}"])
    rates = {line["lr"]: line for line in lines(tmp_path, "claims_rates")}
    assert {lr: line["turned"] for lr, line in rates.items()} == {"0.001": "False", "0.003": "True"}
    assert float(rates["0.003"]["difference"]) == pytest.approx(-3.0, abs=0.005), "without the tuning seed"
    assert rates["0.003"]["pairs"] == "3"
    assert "| 0.003 |" in (tmp_path / "tables" / "claims.md").read_text(encoding="utf-8")


def test_diverged_runs_decide_nothing_and_are_named(tmp_path: Path) -> None:
    study(tmp_path)
    for seed in (5, 6):
        make_record(tmp_path, "method=wlora_plus", "task=sst2", f"seed={seed}", "k=5", status="diverged")
    main(["claims", f"results_dir={tmp_path}"])
    found = {(line["a"], line["task"]): line for line in lines(tmp_path, "claims")}
    verdicts = {task: found["WLoRA+", task]["verdict"] for task in ("SST-2", "RTE", "all")}
    assert verdicts == {"SST-2": "undecided", "RTE": "does not hold", "all": "undecided"}
    assert [found["WLoRA+", task]["diverged_a"] for task in ("SST-2", "RTE", "all")] == ["2", "0", "2"]
    page = (tmp_path / "tables" / "claims.md").read_text(encoding="utf-8")
    assert "5 (diverged: 2 of WLoRA+)" in page
    profile = next(line for line in lines(tmp_path, "claims_methods1") if line["method"] == "wlora_plus")
    assert float(profile["at_least_-5"]) == pytest.approx((5 / 7 + 1) / 2)


def test_parameters_are_those_of_the_compared_tasks(tmp_path: Path) -> None:
    for task, kept in (("sst2", 600), ("rte", 300)):
        for method, final in (("rlora k=5", kept), ("wlora k=5", 600)):
            for seed in range(2):
                parameters = {"adapter_initial": 2000, "adapter_final": final, "base": 0, "head": 10, "total": 9000}
                words = [f"method={method.split()[0]}", "k=5", f"task={task}", f"seed={seed}"]
                make_record(tmp_path, *words, metrics=0.8 + seed / 100, parameters=parameters)
    main(["claims", f"results_dir={tmp_path}"])
    shares = {line["task"]: float(line["parameters_share"]) for line in lines(tmp_path, "claims")}
    assert shares == {"SST-2": 1.0, "RTE": 2.0, "all": pytest.approx(1200 / 900)}


def test_examples_are_compared_seed_by_seed(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    (tmp_path / "records").mkdir()
    label = np.arange(100) % 2
    for method, words, wrong in (("wlora", ["k=5"], range(4)), ("lora", [], range(2, 20))):
        record = make_record(tmp_path, f"method={method}", "task=sst2", *words, metrics=0.8)
        prediction = np.where(np.isin(np.arange(100), list(wrong)), 1 - label, label)
        table = pa.table({"split": ["validation"] * 100 + ["other"], "label": [*label, 0], "prediction": [*prediction, 1]})
        record.predictions = store.write_predictions(record.run_id, table)
        store.write(record)
    main(["claims", f"results_dir={tmp_path}"])
    (line,) = lines(tmp_path, "claims_examples")
    assert (line["examples"], line["both"], line["only_a"], line["only_b"]) == ("100", "80", "16", "2")
    assert float(line["p"]) == pytest.approx(0.001312, abs=1e-6)
    store.path(record.run_id).with_suffix(".parquet").write_bytes(b"torn")
    assert Predictions(store)(next(run for run in read_runs(tmp_path) if run.method == "lora")) is None


def test_the_scores_shown_are_those_tested(tmp_path: Path) -> None:
    study(tmp_path)
    everything = read_runs(tmp_path)
    best = {run.record.run_id: {"accuracy": run.score + (0.1 if run.method == "rlora" else 0.0)} for run in everything}
    table = fill(LAYOUTS["1"], everything, model="minilm", best=best, score="best")
    assert check_claims([table])[0].found.mean == pytest.approx(2.2 - 10.0)


def test_nothing_to_compare_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_record(tmp_path, "method=lora", "task=sst2", metrics=0.8)
    with pytest.raises(SystemExit) as end:
        main(["claims", f"results_dir={tmp_path}"])
    assert end.value.code == 2
    assert "no two methods of a claim have runs on a common task" in capsys.readouterr().err
