"""Every YAML file composes and resolves, and says of a method exactly what its class takes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.conftest import compose
from tests.support.conf_files import METHODS, options, read, read_method
from wlora.cli.help import read_comments
from wlora.config.rules import RULES, canonical, satisfies
from wlora.config.schema import METHOD_NOTES, MODULE_NAMES, Decides, config_folder, walk
from wlora.errors import ConfigError
from wlora.methods.registry import build_method

# The family that has every head; its tiny model reads 512 tokens.
ANY_HEAD = ("model=tiny_bart", "task.max_length=512")


@pytest.mark.parametrize("name", options("task"))
def test_every_task_composes(name: str) -> None:
    model = ["model=tiny_bert"] if name == "token_classification" else ANY_HEAD
    task = compose(f"task={name}", *model).task
    assert task.name == name and task.primary_metric in task.metrics
    own = task.benchmark == "table"  # filled in from the table
    assert bool(task.columns) is bool(task.validation) is not own


@pytest.mark.parametrize("name", options("model"))
def test_every_model_composes(name: str) -> None:
    # `hub` stands for any repository, of which the architecture comes from the hub.
    any_model = ["model.hub_id=owner/hub", "+model.architecture.model_type=bert", "+model.architecture.num_hidden_layers=2"]
    config = compose(f"model={name}", *(any_model if name == "hub" else []))
    assert config.model.name == name and "model_type" in config.model.architecture and config.k >= 1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_composes(name: str) -> None:
    config = compose(f"method={name}")
    assert config.method["name"] == name and not set(METHOD_NOTES) & set(config.method)


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes(name: str) -> None:
    content = read("experiment", name)
    for task in content.get("per_task", [None]):
        config = compose(f"experiment={name}", *([f"task={task}"] if task else []))
        assert config.per_task == {}, "its figures stand in the keys that read them"


TABLE8 = {
    "mnli": (256, 16),
    "sst2": (128, 32),
    "cola": (1024, 16),
    "qqp": (1024, 8),
    "qnli": (256, 16),
    "rte": (256, 16),
    "mrpc": (512, 32),
    "stsb": (256, 16),
}
TABLE9 = {"table4": {"squad_v1": (10, 32), "squad_v2": (15, 32)}, "table5": {"xsum": (35, 8), "cnn_dailymail": (25, 8)}}


@pytest.mark.parametrize("task", TABLE8)
def test_table_3_is_the_papers_table_8(task: str) -> None:
    assert set(read("experiment", "table3")["per_task"]) == set(TABLE8)
    config = compose("experiment=table3", f"task={task}", "method=wlora")
    assert (config.train.max_steps, config.task.batch_size) == TABLE8[task]
    assert config.train.accumulation_steps == 2 and config.warmup == 25
    assert (config.model.name, config.targets, config.method["k"]) == ("llama3_8b", "all", 100)


@pytest.mark.parametrize(("table", "task"), [(table, task) for table, tasks in TABLE9.items() for task in tasks])
def test_tables_4_and_5_are_the_papers_table_9(table: str, task: str) -> None:
    assert set(read("experiment", table)["per_task"]) == set(TABLE9[table])
    config = compose(f"experiment={table}", f"task={task}", "method=wlora")
    assert (config.task.epochs, config.task.batch_size) == TABLE9[table][task]
    assert config.train.max_steps is None and config.train.accumulation_steps == 1
    expected = {"table4": ("deberta_v3_base", "release", 20), "table5": ("bart_large", "all", 20)}
    assert (config.model.name, config.targets, config.method["k"]) == expected[table]


@pytest.mark.parametrize("table", ["table3", "table4", "table5"])
def test_a_sweep_of_a_table_runs_over_the_papers_grids(table: str) -> None:
    params = read("experiment", table)["hydra"]["sweeper"]["params"]
    rates = [float(rate) for rate in params["lr"].split(",")]
    assert rates == [1e-6, 3e-5, 5e-5, 8e-5, 1e-4, 3e-4, 5e-4, 8e-4, 1e-3] + [5e-3] * (table == "table3")
    warmups = [int(steps) for steps in params["warmup"].split(",")]
    assert warmups == ([10, 25, 30, 50] if table == "table3" else [0, 20, 50, 70, 100, 200])


def test_what_is_given_on_the_command_line_replaces_an_experiments_figure() -> None:
    config = compose("experiment=table3", "task=cola", "task.batch_size=4", "train.max_steps=50", "targets=qkv")
    assert (config.task.batch_size, config.train.max_steps, config.targets) == (4, 50, "qkv")


def test_every_file_is_in_a_group_that_is_tested() -> None:
    tested = {"task", "model", "method", "experiment", "hydra", "hardware"}  # the last two in test_launchers.py
    found = {file.relative_to(config_folder()).parts[0] for file in config_folder().rglob("*.yaml")}
    assert found == tested | {"config.yaml"}


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_keys_are_the_arguments_of_its_class(name: str) -> None:
    keys = set(compose(f"method={name}").method) - {"name", "targets", "revision"}
    policy = type(build_method(compose(f"method={name}").method))
    taken: set[str] = set()
    for kind in policy.__mro__:  # `settings` are the arguments of the class above
        if "__init__" in vars(kind) and kind is not object:
            parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
            taken |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    assert keys == taken
    assert Path(inspect.getfile(policy)).stem == name


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_keys_are_shared_ones_or_have_a_rule(name: str) -> None:
    content = read_method(name)
    rules = content.get("allowed", {})
    own = set(content) - {"name", *METHOD_NOTES}
    assert set(rules) <= own
    for key in own:
        if key in rules:
            assert satisfies(content[key], rules[key])
        else:
            assert key in RULES and content[key] == f"${{{key}}}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is_and_what_its_keys_mean(name: str) -> None:
    content = read_method(name)
    assert content["about"].endswith(".") and content["about"].count(". ") == 0
    assert re.search(r"arXiv \d{4}\.\d{5}|ACL 20\d\d|the paper reproduced here|^none; ", content["paper"])
    assert all(isinstance(item, str) for item in content.get("ambiguous", []))
    assert set(content.get("allowed", {})) <= set(read_comments(config_folder() / "method" / f"{name}.yaml"))


def test_every_shared_key_says_what_it_means() -> None:
    for name, part in walk():
        assert part.metadata["meaning"] and part.metadata["decides"] in get_args(Decides), name


CHOICES = {
    "train.prefix_cache=OFF": "off",
    "train.prefix_cache=false": "off",
    "train.prefix_cache='off'": "off",
    "train.prefix_cache=Memory": "memory",
    "train.prefix_cache_dtype=FP32": "fp32",
    "train.grow_batch=Micro": "micro",
    "precision=FP32": "fp32",
    "compat=Release": "release",
    "track=TensorBoard": "tensorboard",
    "model.quantization=NONE": "none",
    "model.source=Random": "random",
    "targets=QKV": "qkv",
    "targets=Attention@01": "attention@1",
    "targets=[query,*.dense,query,QKV]": "*.dense,qkv,query",
    "targets='value, query@01'": "query,value@1",
    "method.targets=ALL": "all",
    "method.schedule=Single": "single",
    "method.extension=QR": "qr",
    "method.rescale='FALSE'": False,
    "method.keep_moments=TRUE": True,
}


@pytest.mark.parametrize("word", CHOICES)
def test_a_choice_has_one_spelling_in_a_run(word: str) -> None:
    config = compose("model=tiny_bert", "task=story_nli", "method=wlora_plus", word)
    key = word.partition("=")[0]
    found: Any = dataclasses.asdict(config)
    for part in key.split("."):
        found = found[part]
    assert found == CHOICES[word] and type(found) is type(CHOICES[word])
    if key == "targets":
        assert config.method["targets"] == CHOICES[word]


@pytest.mark.parametrize("key", [key for key, rule in RULES.items() if "|" in rule])
def test_every_key_with_choices_is_compared_as_it_is_used(key: str) -> None:
    for choice in RULES[key].split(" | "):
        if choice not in ("SET@LAYER", MODULE_NAMES):
            assert canonical(choice.upper(), RULES[key]) == choice and satisfies(choice.upper(), RULES[key])
    assert canonical(False, "off | memory") == "off" and canonical("True", "on | off") == "on"
    assert not satisfies("qkv@" + "9" * 5000, RULES["targets"]) and not satisfies(None, RULES[key])


@pytest.mark.parametrize("word", ["method.rank=-1", "method.dropout=2", "method.targets=none", "method.name=[1]"])
def test_a_methods_copy_of_a_shared_key_obeys_the_same_rule(word: str) -> None:
    with pytest.raises(ConfigError, match="method"):
        compose("method=lora", word)


def test_a_methods_rules_are_the_packages() -> None:
    assert compose("method=wlora", "method.allowed=null").method["lr_omega"] == 5.0
    with pytest.raises(ConfigError, match="method.lr_omega=x: allowed is float > 0"):
        compose("method=wlora", "method.lr_omega=x", "method.allowed.lr_omega=x")


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_rules_can_be_read(name: str) -> None:
    for rule in read_method(name).get("allowed", {}).values():
        for value in (None, True, "word", -1, 0, 1, 0.5, float("nan")):
            assert satisfies(value, rule) in (True, False)
        assert not satisfies("no such value", rule)


def test_the_rules_of_the_shared_keys_can_be_read() -> None:
    for rule in RULES.values():
        for value in (None, "word", -1, 1, 0.5):
            satisfies(value, rule)
    with pytest.raises(ValueError, match="unreadable rule"):
        satisfies(1, "int above 0")
