"""Every figure renders from one record and from many, or says what is missing; what is drawn is what was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from matplotlib import pyplot

from tests.conftest import ROOT
from tests.support.synthetic import make_record
from wlora.analysis.figures import adapters, canvas, cost, footprint, scores
from wlora.analysis.study_reader import read_runs
from wlora.cli import figures
from wlora.errors import ConfigError
from wlora.storage.records import RecordStore

NAMES = ("dot_products", "memory", "adapters", "pareto", "curves", "rates", "selection")
QUERY, KEY, VALUE = (f"bert.encoder.layer.{{}}.attention.self.{kind}" for kind in ("query", "key", "value"))


@pytest.fixture(autouse=True)
def _no_figure_stays_open() -> object:
    yield
    pyplot.close("all")


def kept(*names: str, omega: float = 0.5) -> dict[str, object]:
    events = [
        {"step": 10, "kind": "cut", "kept": list(names), "omega": dict.fromkeys(names, omega) | {QUERY.format(0): 0.0}}
    ]
    return {"adapters": [{"name": name, "omega": omega, "rank": 8} for name in names], "events": events}


def one_of_each(results: Path, seeds: int = 1) -> None:
    """Write records, curves and a measurement for every figure."""
    for seed in range(seeds):
        chosen = (QUERY.format(5), VALUE.format(4 + seed % 2))
        record = make_record(
            results, "method=wlora", "task=sst2", "k=5", f"seed={seed}", metrics=0.8 + seed / 100, **kept(*chosen)
        )
        points = [{"step": step, "loss": 1 / step} for step in (10, 20)] + [{"step": 20, "metrics": {"accuracy": 0.8}}]
        (results / "records" / f"{record.run_id}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
        for lr in ("1e-3", "3e-3"):
            make_record(results, "method=lora", "task=sst2", f"seed={seed}", f"lr={lr}", metrics=0.7)
        product = [{"step": 50, "kind": "dot_product", "adapter": QUERY.format(5), "value": -0.25}]
        make_record(results, "method=single", "task=sst2", "method.index=15", f"seed={seed}", events=product)
    point = {"order": "lowest first", "connected": 3, "saved_bytes": 2**30, "peak_bytes": None}
    setting = {"model": "minilm", "rank": 8, "n": 18, "batch_size": 32, "length": 64, "environment": {"precision": "fp32"}}
    (results / "memory").mkdir(exist_ok=True)
    (results / "memory" / "minilm.json").write_text(json.dumps({**setting, "points": [point]}))


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_written_as_png_and_pdf(name: str, seeds: int, tmp_path: Path) -> None:
    one_of_each(tmp_path, seeds)
    figures.main([name, f"results_dir={tmp_path}"])
    png, pdf = (tmp_path / "figures" / f"{name}.{kind}" for kind in ("png", "pdf"))
    assert png.read_bytes().startswith(b"\x89PNG") and pdf.read_bytes().startswith(b"%PDF")
    assert len(list((tmp_path / "figures").iterdir())) == 2


@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_nothing_to_draw_is_said_clearly(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_record(tmp_path, "method=lora", "task=sst2", status="failed")
    with pytest.raises(SystemExit) as end:
        figures.main([name, f"results_dir={tmp_path}"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) <= 2
    assert not (tmp_path / "figures").exists()


def test_an_unknown_figure_is_refused_with_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_of_each(tmp_path)
    with pytest.raises(SystemExit):
        figures.main(["paretto", f"results_dir={tmp_path}"])
    assert "did you mean pareto?" in capsys.readouterr().err


def test_the_same_records_give_the_same_files(tmp_path: Path) -> None:
    one_of_each(tmp_path)
    figures.main(["pareto", f"results_dir={tmp_path}"])
    first = [file.read_bytes() for file in sorted((tmp_path / "figures").iterdir())]
    shutil.rmtree(tmp_path / "figures")
    figures.main(["pareto", f"results_dir={tmp_path}"])
    assert first == [file.read_bytes() for file in sorted((tmp_path / "figures").iterdir())]


def test_the_heat_map_shows_the_share_of_seeds_that_keep_an_adapter(tmp_path: Path) -> None:
    for seed, name in enumerate((VALUE.format(4), VALUE.format(4), KEY.format(3))):
        make_record(tmp_path, "method=wlora", "task=sst2", "k=5", f"seed={seed}", **kept(name))
    (image,) = adapters.adapters(read_runs(tmp_path)).axes[0].images
    shares = image.get_array()
    assert shares is not None and shares.shape == (6, 3)
    assert (shares[4, 2], shares[3, 1], shares.sum()) == pytest.approx((2 / 3, 1 / 3, 1.0))


def test_pareto_draws_means_over_seeds_against_parameters_and_seconds(tmp_path: Path) -> None:
    for seed, score in enumerate((0.7, 0.8, 0.9)):
        seconds = {"train": 10.0 + seed, "eval": 1.0, "total": 20.0}
        make_record(tmp_path, "method=lora", "task=sst2", f"seed={seed}", metrics=score, seconds=seconds)
    upper, lower = cost.pareto(read_runs(tmp_path)).axes
    assert upper.lines[0].get_xydata().tolist() == [pytest.approx([1000, 0.8])]
    assert lower.lines[0].get_xydata().tolist() == [pytest.approx([11, 0.8])]


def test_rates_draws_the_reported_seeds_or_the_tuning_seed_and_stars_the_choice(tmp_path: Path) -> None:
    for lr, score in (("3e-4", 0.6), ("1e-3", 0.8), ("3e-3", 0.7)):
        make_record(tmp_path, "method=lora", "task=sst2", "seed=100", f"lr={lr}", metrics=score)
        for seed in range(3):
            words = ("method=wlora", "k=5", "task=sst2", f"seed={seed}", f"lr={lr}")
            make_record(tmp_path, *words, metrics=score - 0.1 + seed / 100)
    for seed in range(3):
        make_record(tmp_path, "method=lora", "task=sst2", f"seed={seed}", "lr=1e-3", metrics=0.75)
    make_record(tmp_path, "method=probe", "task=sst2", metrics=0.5)  # at one rate: no line
    (axis,) = scores.rates(read_runs(tmp_path)).axes
    drawn = {container.get_label(): container for container in axis.containers}
    assert drawn["LoRA"][0].get_xydata().tolist() == [[3e-4, 0.6], [1e-3, 0.8], [3e-3, 0.7]], "the tuning seed's"
    assert drawn["WLoRA K=5"][0].get_ydata().tolist() == pytest.approx([0.51, 0.71, 0.61]) and drawn["WLoRA K=5"].has_yerr
    stars = [container[0] for container in axis.containers if container[0].get_marker() == "*"]
    assert sorted(star.get_ydata()[0] for star in stars) == pytest.approx([0.71, 0.75])
    places = sorted(star.get_xdata()[0] for star in stars)
    assert places == pytest.approx([1e-3, 1e-3], rel=0.05) and places[0] < places[1], "side by side"
    assert axis.get_xscale() == "log" and [t.get_text() for t in axis.get_xticklabels()] == ["3e-4", "1e-3", "3e-3"]


def test_a_figure_finds_its_model_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, seeds in (("minilm", 2), ("tiny_bert", 1)):
        for seed in range(seeds):
            make_record(tmp_path, "method=lora", "task=sst2", f"model={model}", f"seed={seed}")
    figures.main(["pareto", f"results_dir={tmp_path}"])
    assert "runs of model=minilm; model=NAME chooses among minilm, tiny_bert" in capsys.readouterr().out
    figures.main(["pareto", f"results_dir={tmp_path}", "model=tiny_bert"])
    assert "model=" not in capsys.readouterr().out


def test_a_legend_of_long_names_stays_on_the_page(tmp_path: Path) -> None:
    for price in (1e-4, 1e-3, 1e-2, 1e-1):
        for rule in ("once", "projected"):
            words = ("method=wlora_depth", "task=sst2", f"method.depth_cost={price}", f"method.rule={rule}")
            make_record(tmp_path, *words, metrics=0.8)
    (legend,) = cost.pareto(read_runs(tmp_path)).legends
    box, page = legend.get_window_extent(), legend.figure.bbox
    assert len(legend.get_texts()) == 8 and box.x0 >= page.x0 and box.x1 <= page.x1


def test_dot_products_are_absolute_means_and_kept_adapters_have_stars(tmp_path: Path) -> None:
    one_of_each(tmp_path, 3)
    (axis,) = adapters.dot_products(read_runs(tmp_path)).axes
    (bar,) = axis.patches
    assert bar.get_height() == pytest.approx(0.25)
    assert [text.get_text() for text in axis.texts] == ["★"], "query of layer 5, which all runs keep"


def test_selection_draws_score_against_k_and_omega_of_all_adapters(tmp_path: Path) -> None:
    for k, score in ((1, 0.6), (3, 0.7), (5, 0.75)):
        make_record(tmp_path, "method=wlora", "task=sst2", f"k={k}", metrics=score, **kept(VALUE.format(5)))
    make_record(tmp_path, "method=lora", "task=sst2", metrics=0.8)
    by_k, histogram = scores.selection(read_runs(tmp_path)).axes
    assert sorted(by_k.lines[0].get_xydata().tolist()) == [[1, 0.6], [3, 0.7], [5, 0.75]]
    assert 0.8 in [line.get_ydata()[0] for line in by_k.lines] and by_k.get_ylim()[1] > 0.8, "LoRA, inside the panel"
    assert sum(bar.get_height() for bar in histogram.patches) == 6, "two ω in each of three cuts"
    assert "above" not in histogram.get_xlabel()


def test_a_very_large_omega_is_counted_in_the_last_bar(tmp_path: Path) -> None:
    make_record(tmp_path, "method=wlora", "task=sst2", "k=1", metrics=0.6, **kept(VALUE.format(5), omega=50.0))
    histogram = scores.selection(read_runs(tmp_path)).axes[-1]
    edge = max(bar.get_x() + bar.get_width() for bar in histogram.patches)
    assert edge == pytest.approx(2.0) and histogram.patches[-1].get_height() == 1
    assert "2 and above" in histogram.get_xlabel()


def test_selection_draws_score_against_t_where_several_have_run(tmp_path: Path) -> None:
    for steps, score in ((5, 0.7), (10, 0.75)):
        events = [{"step": steps, "kind": "cut", "omega": {VALUE.format(5): 0.5}}]
        words = ("method=wlora", "task=sst2", "k=5", f"method.select_steps={steps}")
        make_record(tmp_path, *words, metrics=score, events=events)
    _, by_steps, _ = scores.selection(read_runs(tmp_path)).axes
    assert by_steps.lines[0].get_xydata().tolist() == [[5, 0.7], [10, 0.75]]


def test_marks_at_one_place_stand_side_by_side() -> None:
    moved = canvas.side_by_side([1.0, 2.0, 1.0, 1.0], ratio=2.0, widest=100.0)
    assert moved == pytest.approx([0.5, 2.0, 1.0, 2.0])
    assert max(canvas.side_by_side([1.0] * 9, ratio=2.0, widest=4.0)) == pytest.approx(2.0)


def test_more_settings_than_can_be_told_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match="25 settings, more than the 24"):
        canvas.style_of([str(number) for number in range(25)])
    styles = canvas.style_of([str(number) for number in range(24)]).values()
    assert len({(style["color"], style["marker"]) for style in styles}) == 24


def test_seconds_are_those_of_one_kind_of_machine(tmp_path: Path) -> None:
    for seed, (processor, train) in enumerate((("Quick", 10.0), ("Quick", 12.0), ("Slow", 90.0))):
        environment = {"precision": "fp32", "processor": processor}
        seconds = {"train": train, "eval": 1.0, "total": train}
        make_record(tmp_path, "method=lora", "task=sst2", f"seed={seed}", seconds=seconds, environment=environment)
    _, lower = cost.pareto(read_runs(tmp_path)).axes
    assert lower.lines[0].get_xdata().tolist() == [pytest.approx(11)] and "Quick" in lower.get_xlabel()


def test_seconds_of_a_busy_machine_are_left_out(tmp_path: Path) -> None:
    for seed, train in enumerate((10.0, 21.0)):
        seconds = {"train": train, "eval": 1.0, "total": train}
        make_record(tmp_path, "method=lora", "task=sst2", f"seed={seed}", seconds=seconds)
    (axis,) = cost.pareto(read_runs(tmp_path)).axes
    assert "parameters" in axis.get_xlabel()


def test_many_settings_are_drawn_in_several_rows_each_with_the_lora_of_its_targets(tmp_path: Path) -> None:
    some = [["method=lora", "targets=qkv"], *(["method=wlora", "targets=qkv", f"k={k}"] for k in range(1, 17))]
    others = [["method=lora", "targets=all"], ["method=wlora", "targets=all", "k=5"]]
    for words in (["method=full"], *some, *others):
        for lr in ("1e-3", "3e-3"):
            make_record(tmp_path, "task=sst2", *words, f"lr={lr}", metrics=0.8)
    drawn = [axis.get_legend_handles_labels()[1] for axis in scores.rates(read_runs(tmp_path)).axes]
    drawn = [[label for label in labels if "chosen" not in label] for labels in drawn]
    assert [len(labels) for labels in drawn] == [7, 7, 6, 2], "LoRA and a third of 17, and the two settings of all linears"
    assert [labels[0] for labels in drawn] == ["LoRA targets=qkv"] * 3 + ["LoRA targets=all"]
    assert drawn[0][1] == "Full fine-tuning"


def test_the_panels_keep_their_size_beside_a_long_legend(tmp_path: Path) -> None:
    for steps in range(2, 14):
        words = ("method=wlora", "task=sst2", "k=5", f"method.select_steps={steps}")
        record = make_record(tmp_path, *words, metrics=0.8)
        points = [{"step": step, "loss": 1.0, "metrics": {"accuracy": 0.8}} for step in (10, 20)]
        (tmp_path / "records" / f"{record.run_id}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    figure = scores.curves(read_runs(tmp_path), RecordStore(tmp_path))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert all(legend.get_window_extent().y1 <= axis.get_window_extent().y0 for axis in figure.axes)


def test_more_panels_than_a_page_holds_are_refused_with_the_way_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("sst2", "rte"):
        make_record(tmp_path, "method=wlora", f"task={task}", "k=5", metrics=0.8, **kept(VALUE.format(5)))
    monkeypatch.setattr("wlora.analysis.figures.canvas.PANELS", 1)
    with pytest.raises(SystemExit):
        figures.main(["adapters", f"results_dir={tmp_path}"])
    assert "2 panels, more than 1\nway out: choose, as in task=sst2" in capsys.readouterr().err
    figures.main(["adapters", "task=rte", f"results_dir={tmp_path}"])


def test_memory_is_drawn_in_gib(tmp_path: Path) -> None:
    one_of_each(tmp_path)
    (axis,) = footprint.memory(tmp_path / "memory").axes
    assert axis.lines[0].get_xydata().tolist() == [[3, 1]]
    with pytest.raises(ConfigError, match="no measurement"):
        footprint.memory(tmp_path / "memory", "another")


def test_curves_skip_the_torn_last_line_of_a_crash(tmp_path: Path) -> None:
    one_of_each(tmp_path)
    for file in (tmp_path / "records").glob("*.jsonl"):
        file.write_text(file.read_text() + '{"step": 30, "lo')
    upper, lower = scores.curves(read_runs(tmp_path), RecordStore(tmp_path)).axes
    assert upper.lines[0].get_xdata().tolist() == [10, 20]
    assert not lower.lines and "a single evaluation" in lower.texts[0].get_text(), "no panel for one point"


def test_the_committed_study_can_be_drawn(tmp_path: Path) -> None:
    runs = read_runs(ROOT / "results" / "first_runs")
    assert len(cost.pareto(runs).axes) == 2, "two tasks; seconds of a busy machine are left out"
