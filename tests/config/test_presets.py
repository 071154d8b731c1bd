"""`method.preset` and `task.preset`: what they set, what wins over them, and that the run is the one spelled out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.conftest import ROOT, TINY, compose, enter_main
from tests.support.conf_files import METHODS, options, read, read_method
from wlora.cli.sweep import compose as compose_cell
from wlora.config.identity import method_revision, run_id, scientific_fields
from wlora.config.presets import TEXTS, apply_presets, explicit_keys
from wlora.config.rules import RULES, satisfies
from wlora.errors import ConfigError
from wlora.methods.base import Steps
from wlora.methods.registry import build_method
from wlora.storage.records import RecordStore
from wlora.training.run_length import make_plan

PRESETS = [(name, preset) for name in METHODS for preset in read_method(name).get("presets", {})]
TASK_PRESETS = [(name, preset) for name in options("task") for preset in read("task", name).get("presets", {})]
AUTHORS, RELEASE = "method.preset=authors", "task.preset=release"


def by_task(name: str, preset: str) -> dict[str, Any]:
    return {task: values for task, values in read_method(name)["presets"][preset].items() if task not in TEXTS}


def tasks_of(name: str, preset: str) -> list[str]:
    """Return the tasks that a preset has values for; one without tasks is for all, of which two stand here."""
    return sorted(set(by_task(name, preset)) - {"all"}) or ["mrpc", "rte"]


def by_method(task: str, preset: str) -> dict[str, Any]:
    return {method: values for method, values in read("task", task)["presets"][preset].items() if method not in TEXTS}


def chosen(task: str, method: str) -> list[str]:
    """Return the words for a task and method, with a model that has the task's head."""
    summaries = read("task", task)["kind"] == "summarization"
    return [f"task={task}", f"method={method}", *(["model=bart_large"] if summaries else [])]


def spell(values: dict[str, Any]) -> list[str]:
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


def identity(*overrides: str) -> str:
    return run_id(scientific_fields(compose(*overrides), task_data=None, model_data=None, precision="fp32"))


def test_the_authors_values_reach_the_configuration() -> None:
    config = compose("task=rte", "method=adalora", AUTHORS)
    assert (config.lr, config.alpha, config.warmup, config.targets, config.rank) == (1.2e-3, 32, 200, "all", 1)
    assert (config.task.epochs, config.task.batch_size, config.train.accumulation_steps) == (50, 32, 1)
    assert (config.task.max_length, config.method["dropout"]) == (320, 0)
    method = config.method
    assert (method["rank"], method["initial_rank"], method["start_steps"], method["orthogonal"]) == (1, 2, 600, 0.3)
    assert compose("task=qqp", "method=adalora", AUTHORS).method["alpha"] == 16
    assert compose("method=milora", AUTHORS).method["alpha"] == 64, "the method's own default follows the rank"


def test_dropout_and_weight_decay_of_increlora_differ_by_task() -> None:
    found = {}
    for task in ("cola", "mnli", "mrpc", "sst2", "stsb"):
        config = compose(f"task={task}", "method=increlora", AUTHORS)
        found[task] = config.task.max_length, config.method["dropout"], config.train.weight_decay
    assert found == {
        "cola": (64, 0, 0),
        "mnli": (256, 0, 0),
        "mrpc": (320, 0.3, 0.01),
        "sst2": (128, 0.3, 0.01),
        "stsb": (128, 0, 0.1),
    }


def test_warm_ups_of_the_release() -> None:
    warmups = {name: compose("task=squad_v1", f"method={name}", AUTHORS).warmup for name in ("lora", "wlora", "wlora_plus")}
    assert warmups == {"lora": 0, "wlora": 0, "wlora_plus": 50}
    assert compose("task=rte", "method=lora", AUTHORS).warmup == 100


def test_a_task_goes_before_all() -> None:
    assert compose("task=mnli", "method=adalora", AUTHORS).method["initial_rank"] == 3
    assert compose("task=cola", "method=melora", AUTHORS).task.batch_size == 64


def test_explicit_keys_win_and_the_rest_of_the_preset_stays() -> None:
    config = compose("task=rte", "method=adalora", AUTHORS, "lr=1e-4", "++alpha=8", "method.every=7")
    assert (config.lr, config.method["alpha"], config.method["every"]) == (1e-4, 8, 7)
    assert (config.warmup, config.method["start_steps"]) == (200, 600)


def test_explicit_epochs_are_not_overruled_by_a_presets_steps() -> None:
    assert compose("method=rlora", AUTHORS).train.max_steps == 512
    assert compose("method=rlora", AUTHORS, "task.epochs=3").train.max_steps is None


def test_explicit_keys_are_read_from_every_form_of_an_override() -> None:
    assert explicit_keys(["task=rte", "+a=1", "++b.c=[1,2]", "~d", "e='x=y'"]) == {"task", "a", "b.c", "d", "e"}


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_run_with_a_preset_is_the_run_spelled_out(name: str, preset: str) -> None:
    tasks = tasks_of(name, preset)
    for task in {tasks[0], tasks[-1]}:
        values = by_task(name, preset).get("all", {}) | by_task(name, preset).get(task, {})
        words = chosen(task, name)
        assert identity(*words, f"method.preset={preset}") == identity(*words, *spell(values))


@pytest.mark.parametrize(("task", "preset"), TASK_PRESETS)
def test_a_run_with_a_tasks_preset_is_the_run_spelled_out(task: str, preset: str) -> None:
    found = by_method(task, preset)
    for method in {"adalora", *found} - {"all"}:
        values = found.get("all", {}) | found.get(method, {})
        words = chosen(task, method)
        assert identity(*words, f"task.preset={preset}") == identity(*words, *spell(values)) != identity(*words)


@pytest.mark.parametrize(("task", "preset"), TASK_PRESETS)
def test_a_tasks_preset_has_known_keys_with_allowed_values(task: str, preset: str) -> None:
    content = read("task", task)["presets"][preset]
    assert content["source"] and content["left_out"]
    assert set(by_method(task, preset)) <= {"all", *METHODS}
    for values in by_method(task, preset).values():
        assert all(satisfies(value, RULES[key]) for key, value in values.items())


def test_the_release_of_xsum_has_lengths_rows_and_beams_and_others_for_lora() -> None:
    def found(method: str) -> tuple[Any, ...]:
        task = compose("experiment=table5", f"method={method}", RELEASE).task
        assert (task.epochs, task.batch_size, task.max_eval_rows, task.generation.num_beams) == (35, 8, 1000, 8)
        assert (task.preset, task.presets) == (None, {})
        return task.max_train_rows, task.max_length, task.max_target_length, task.generation.max_new_tokens

    assert found("wlora") == found("wlora_plus") == found("adalora") == (5000, 256, 160, 256)
    assert found("lora") == (7000, 128, 64, 128)


@pytest.mark.parametrize(("task", "epochs"), [("squad_v1", 10), ("squad_v2", 15)])
def test_the_release_of_squad_has_shorter_windows(task: str, epochs: int) -> None:
    config = compose("experiment=table4", f"task={task}", RELEASE)
    assert (config.task.max_length, config.task.stride) == (128, 32)
    assert (config.task.epochs, config.task.batch_size, config.train.accumulation_steps) == (epochs, 32, 1)


def test_presets_of_task_and_method_go_together_and_explicit_keys_win() -> None:
    words = ("experiment=table5", "method=lora", RELEASE, AUTHORS)
    config = compose(*words, "task.generation.num_beams=4")
    assert (config.lr, config.warmup, config.task.max_length, config.task.generation.num_beams) == (1e-3, 100, 128, 4)
    composed = OmegaConf.create(
        {
            "task": {"name": "t", "preset": "p", "presets": {"p": {"all": {"x": 1, "y": 1}, "m": {"y": 2, "z": 2}}}},
            "method": {"name": "m", "preset": "q", "presets": {"q": {"t": {"z": 3}}}},
        }
    )
    assert apply_presets(composed, []) == {"x": 1, "y": 2, "z": 3}, "the method's goes before the task's"


def test_a_survey_of_a_sweep_applies_presets() -> None:
    cell = compose_cell(["task=rte", "method=adalora", AUTHORS])
    assert (cell.lr, cell.task.max_length, cell.method["initial_rank"]) == (1.2e-3, 320, 2)
    assert compose_cell(["experiment=figure2"]).alpha == 8


def test_a_step_of_selection_beyond_an_epoch_is_left_out() -> None:
    """The release selects until step 20; an epoch of MRPC has 10 steps here and one of RTE 7."""
    steps = {}
    for task in tasks_of("wlora_plus", "authors"):
        config = compose(f"task={task}", "method=wlora_plus", AUTHORS)
        assert config.method["schedule"] == "halvings"
        steps[task] = config.method["select_steps"]
        per_epoch = make_plan(config, config.task.train_rows).steps_per_epoch
        assert (steps[task] is None) == (task in ("mrpc", "rte")) and (steps[task] or 0) <= per_epoch
        assert steps[task] is not None or per_epoch < 20
    assert steps["cola"] == 20 and steps["squad_v1"] == 10


def test_figure_2_is_the_preset_of_its_method() -> None:
    config = compose("experiment=figure2")
    assert (config.task.name, config.method["name"], config.targets) == ("mnli", "single", "qkv")
    assert (config.method["rank"], config.method["alpha"], config.method["dropout"]) == (8, 8, 0), "scale 1"
    assert (config.lr, config.warmup, config.train.max_steps, config.method["gradient_rows"]) == (8e-4, 0, 256, 49152)
    assert (config.task.batch_size, config.train.accumulation_steps) == (32, 6)
    assert compose("experiment=figure2", "train.max_steps=9", "task=sst2").train.max_steps == 9


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_preset_has_known_keys_with_allowed_values_and_fits_its_runs(name: str, preset: str) -> None:
    content = read_method(name)
    assert content["presets"][preset]["source"]
    assert set(by_task(name, preset)) <= {"all", *options("task")}
    rules = RULES | {f"method.{key}": rule for key, rule in content.get("allowed", {}).items()}
    for values in by_task(name, preset).values():
        assert all(satisfies(value, rules[key]) for key, value in values.items())
    for task in tasks_of(name, preset):
        config = compose(*chosen(task, name), f"method.preset={preset}")
        plan = make_plan(config, config.task.train_rows)
        build_method(config.method).plan(Steps(total=plan.total_steps, per_epoch=plan.steps_per_epoch))


@pytest.mark.parametrize(
    ("name", "share"), [("adalora", {"mrpc": 0.1}), ("dynamic_lora", 0.06), ("melora", 0.06), ("alora", 0.06)]
)
def test_a_warm_up_given_as_a_share_is_that_share_of_a_full_run(name: str, share: Any) -> None:
    shares = share if isinstance(share, dict) else dict.fromkeys(tasks_of(name, "authors"), share)
    for task, part in shares.items():
        config = compose(f"task={task}", f"method={name}", AUTHORS)
        plan = make_plan(config, config.task.train_rows)
        assert plan.warmup - 1 < part * plan.total_steps <= plan.warmup + 1e-6, "rounded up, as transformers does"


def test_what_a_preset_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.preset=author: allowed is authors or null with method=adalora"):
        compose("method=adalora", "method.preset=author")
    with pytest.raises(ConfigError, match=r"method.preset=authors: allowed is null with method=probe"):
        compose("method=probe", AUTHORS)
    with pytest.raises(ConfigError, match=r"authors task=story_nli: allowed is task=cola,mnli,mrpc.* with method=adalora"):
        compose("task=story_nli", "method=adalora", AUTHORS)
    with pytest.raises(ConfigError, match=r"task.preset=nonsense: allowed is release or null with task=xsum"):
        compose("experiment=table5", "task.preset=nonsense")
    with pytest.raises(ConfigError, match=r"task.preset=release: allowed is null with task=cnn_dailymail"):
        compose("experiment=table5", "task=cnn_dailymail", RELEASE)
    for group in ("task", "method"):
        with pytest.raises(ConfigError, match=rf"{group}.presets.x is unknown; did you mean {group}.preset"):
            compose(f"+{group}.presets.x=1", f"{group}.preset=x")


def test_without_a_preset_nothing_changes() -> None:
    method = {"name": "lora", "preset": None, "rank": "${rank}"}
    composed = OmegaConf.create({"method": method, "task": {"name": "rte"}, "rank": 3})
    before = OmegaConf.to_yaml(composed)
    assert apply_presets(composed, []) == {} and OmegaConf.to_yaml(composed) == before


def test_a_run_with_a_preset_trains_and_says_what_was_set(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the entry point, where explicit keys come from Hydra, in a sweep those of each run."""
    words = [*TINY, "method=lora_drop", f"{AUTHORS},null", "method.share=false", f"results_dir={tmp_path}", "lr=1e-3,2e-3"]
    assert enter_main(monkeypatch, "-m", *words) == 0
    records = list(RecordStore(tmp_path))
    found = sorted((r.config["lr"], r.config["method"]["threshold"] or 0, r.config["method"]["share"]) for r in records)
    assert found == [(1e-3, 0, False), (1e-3, 0.9, False), (2e-3, 0, False), (2e-3, 0.9, False)]
    assert capsys.readouterr().out.count("preset: rank=8 method.threshold=0.9 method.sample=0.1\n") == 1


def test_committed_records_keep_their_identity() -> None:
    """Composed today, the runs of the first study have the identities of their records: presets left them alone."""
    files = sorted((ROOT / "results" / "first_runs" / "records").glob("*.json"))
    if not files:
        pytest.skip("records are not part of an sdist")
    seen = set()
    for file in files:
        record = json.loads(file.read_text(encoding="utf-8"))
        config, method = record["config"], record["config"]["method"]["name"]
        if (method, config["task"]["name"]) in seen:
            continue
        seen.add((method, config["task"]["name"]))
        if method_revision(config["method"], release=config["compat"] == "release") > 1:
            continue  # the same keys give other numbers today
        words = [f"{group}={config[group]['name']}" for group in ("task", "model", "method")]
        words += [f"{key}={config[key]}" for key in ("rank", "alpha", "dropout", "lr", "seed", "k", "targets", "compat")]
        words += [f"task.{key}={config['task'][key]}" for key in ("epochs", "batch_size", "max_length")]
        words += [f"task.{key}={config['task'][key] or 'null'}" for key in ("max_train_rows", "max_eval_rows")]
        words += [f"warmup={config['warmup'] or 'null'}", f"train.max_steps={config['train']['max_steps'] or 'null'}"]
        fields = scientific_fields(
            compose(*words),
            task_data=record["task"]["data"],
            model_data=record["model"]["fingerprint"],
            precision=record["environment"]["precision"],
        )
        assert run_id(fields) == record["run_id"]
    assert len(seen) >= 6
