"""Memory of a training step against connected adapters."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from torch import nn

from wlora.cli import memory
from wlora.training.activation_memory import saved_bytes

SMALL = ["model=tiny_bert", "task=sst2", "task.batch_size=2", "task.max_length=16", "rank=2", "dropout=0"]


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], int]:
    results = tmp_path_factory.mktemp("memory")
    memory.main([*SMALL, f"results_dir={results}"])
    (file,) = (results / "memory").glob("*.json")
    return {(p["order"], p["connected"]): p["saved_bytes"] for p in json.loads(file.read_text())["points"]}


def test_fewer_adapters_take_less_and_those_on_top_least(points: dict[tuple[str, int], int]) -> None:
    n = max(connected for _, connected in points)
    assert n == 6
    assert points["lowest first", n] == points["highest first", n]
    assert points["highest first", 1] < points["lowest first", 1] <= points["lowest first", n]
    assert points["highest first", 0] == points["lowest first", 0] < points["highest first", 1]


def test_measuring_leaves_nothing_in_memory() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def tensors() -> int:
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    gc.collect()
    gc.disable()  # on a GPU, memory that waits for a collection is memory that is missing
    try:
        before = tensors()
        assert saved_bytes(model, {"input": torch.ones(2, 4)}) > 0
        assert tensors() == before
    finally:
        gc.enable()


def test_saved_bytes_are_those_of_the_storages_that_the_backward_pass_needs() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # exp saves its output of 12 floats; the product saves that and the parameter, which counts no second time.
            return (x.exp() * self.weight).sum()

    x = torch.zeros(3, 4, requires_grad=True)
    assert saved_bytes(Square(), {"x": x}) == 12 * 4


def test_a_mistake_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        memory.main(["model=tiny_bert", "rank=0"])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: rank=0")
