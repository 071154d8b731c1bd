"""The layouts of the paper's Tables 1-6: the rows and columns, and the runs that belong to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from wlora.analysis.study import Run

LABELS = {
    "full": "Full fine-tuning",
    "probe": "Head only",
    "lora": "LoRA",
    "adalora": "AdaLoRA",
    "increlora": "IncreLoRA",
    "dynamic_lora": "Dynamic LoRA",
    "lora_drop": "LoRA-drop",
    "alora": "ALoRA",
    "melora": "MELoRA",
    "flexlora": "FlexLoRA",
    "flexora": "Flexora",
    "wlora": "WLoRA",
    "wlora_plus": "WLoRA+",
    "wlora_depth": "WLoRA, depth",
    "rlora": "RLoRA",
    "tied_lora": "Tied-LoRA",
    "nora": "NoRA",
    "milora": "MiLoRA",
    "vera": "VeRA",
    "vb_lora": "VB-LoRA",
    "dora": "DoRA",
}


@dataclass(frozen=True)
class Column:
    """The column of a task. Its metrics are keys of `Record.metrics`. If one number is needed, it is their mean."""

    task: str
    title: str
    metrics: tuple[str, ...]
    heading: str


@dataclass(frozen=True)
class Row:
    """A method with its rank and number of kept adapters; each is None if the method has none."""

    method: str
    rank: int | None = None
    k: int | None = None

    @property
    def label(self) -> str:
        """The method's name, with K if the method has one."""
        name = LABELS.get(self.method, self.method)
        return name if self.k is None else f"{name} K={self.k}"


def row_of(run: Run) -> Row:
    """Return the row of a run. WLoRA+ with its default K = n / 4 belongs to the paper's row, which has no K."""
    default = run.method == "wlora_plus" and run.n is not None and run.k == math.ceil(run.n / 4)
    return Row(run.method, run.rank, None if default else run.k)


@dataclass(frozen=True)
class Layout:
    """One table.

    Attributes:
        name: `1` to `6`, or `demo`.
        title: title for the caption.
        model: the paper's model.
        family: `model_type` of the paper's model in transformers.
        columns: one column per task.
        rows: the paper's rows.
        targets: the table contains runs with these target sets.
        ranks: the table contains runs with these ranks; None for any.
        group: compare only rows with equal rank or K; None: compare all rows.
        others: add rows for other methods in the records.
        average: whether there is a column ALL.
        percent: multiply scores by 100.
        pivot: ranks are columns under every task, and parameters are a line under every method.
        parameters: whether parameters are shown.
        seeds: runs per cell in the paper.
        stand_ins: tasks that small studies use in place of the paper's; columns where another model has runs of them.
    """

    name: str
    title: str
    model: str
    family: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    targets: tuple[str, ...]
    ranks: tuple[int, ...] | None = None
    group: Literal["rank", "k"] | None = None
    others: bool = True
    average: bool = True
    percent: bool = False
    pivot: bool = False
    parameters: bool = True
    seeds: int = 5
    stand_ins: tuple[Column, ...] = ()
    remark: str = field(default="", compare=False)

    @cached_property
    def tasks(self) -> frozenset[str]:
        """The names of the columns' tasks, stand-ins included."""
        return frozenset(column.task for column in (*self.columns, *self.stand_ins))

    @cached_property
    def methods(self) -> frozenset[str]:
        """The methods of the paper's rows."""
        return frozenset(row.method for row in self.rows)

    def overlaps(self, other: Layout) -> bool:
        """Tell whether a run can fit both tables by its task and targets."""
        return bool(self.tasks & other.tasks) and not set(self.targets).isdisjoint(other.targets)


GLUE = (
    Column("mnli", "MNLI", ("accuracy",), "Acc"),
    Column("sst2", "SST-2", ("accuracy",), "Acc"),
    Column("cola", "CoLA", ("matthews",), "Mcc"),
    Column("qqp", "QQP", ("accuracy", "f1"), "Acc/F1"),
    Column("qnli", "QNLI", ("accuracy",), "Acc"),
    Column("rte", "RTE", ("accuracy",), "Acc"),
    Column("mrpc", "MRPC", ("accuracy", "f1"), "Acc/F1"),
)
STORY_SUMMARY = Column("story_summary", "Story summary", ("rouge1",), "R1")
RANKS = (1, 2, 4, 8)


def _per_rank(k: int) -> tuple[Row, ...]:
    return tuple(row for rank in RANKS for row in (Row("lora", rank), Row("wlora", rank, k), Row("wlora_plus", rank)))


LAYOUTS = {
    "1": Layout(
        name="1",
        title="Dynamic rank allocation on GLUE, adapters of rank 8 on query, key and value",
        model="deberta_v3_base",
        family="deberta-v2",
        columns=GLUE,
        rows=(
            Row("full"),
            *(Row(name, 8) for name in ("lora", "adalora", "increlora", "dynamic_lora", "lora_drop", "alora", "melora")),
            Row("flexlora", 8),
            *(Row("wlora", 8, k) for k in (1, 5, 10)),
        ),
        targets=("qkv",),
        ranks=(8,),
        remark="The paper's parameters of AdaLoRA, Dynamic LoRA, IncreLoRA and ALoRA are counts before the end of the run.",
    ),
    "2": Layout(
        name="2",
        title="LoRA, WLoRA and WLoRA+ on GLUE at four ranks, adapters on all linears of every layer",
        model="deberta_v3_base",
        family="deberta-v2",
        columns=GLUE,
        rows=_per_rank(20),
        targets=("all", "release"),
        group="rank",
        remark="The paper's shares of parameters are those of 60 adapters (targets=release), not of the 72 of its text.",
    ),
    "3": Layout(
        name="3",
        title="LoRA, WLoRA and WLoRA+ on GLUE at four ranks, adapters on all linears of every layer",
        model="llama3_8b",
        family="llama",
        columns=(*GLUE, Column("stsb", "STS-B", ("corr",), "Corr")),
        rows=_per_rank(100),
        targets=("all",),
        group="rank",
        remark="The paper's shares of parameters are those of the stored elements of a model in 4 bits.",
    ),
    "4": Layout(
        name="4",
        title="LoRA, WLoRA and WLoRA+ on SQuAD at four ranks (F1), adapters on all linears of every layer",
        model="deberta_v3_base",
        family="deberta-v2",
        columns=(Column("squad_v1", "SQuAD v1.1", ("f1",), "F1"), Column("squad_v2", "SQuAD v2.0", ("f1",), "F1")),
        rows=_per_rank(20),
        targets=("all", "release"),
        group="rank",
        average=False,
        percent=True,
        pivot=True,
        remark="The paper labels its rows of WLoRA+ WLoRA k=15; its shares of parameters are those of 60 adapters.",
    ),
    "5": Layout(
        name="5",
        title="LoRA, WLoRA and WLoRA+ on summarisation at four ranks (ROUGE-1), adapters on all linears of every layer",
        model="bart_large",
        family="bart",
        columns=(Column("xsum", "XSum", ("rouge1",), "R1"), Column("cnn_dailymail", "CNN/DailyMail", ("rouge1",), "R1")),
        rows=_per_rank(20),
        targets=("all",),
        group="rank",
        average=False,
        percent=True,
        pivot=True,
        stand_ins=(STORY_SUMMARY,),
        remark="The paper labels its rows of WLoRA+ WLoRA k=48.",
    ),
    "6": Layout(
        name="6",
        title="Selected against random adapters on GLUE, rank 8 on query, key and value",
        model="deberta_v3_base",
        family="deberta-v2",
        columns=GLUE,
        rows=tuple(Row(name, 8, k) for k in (1, 5, 10) for name in ("wlora", "rlora")),
        targets=("qkv",),
        ranks=(8,),
        group="k",
        others=False,
        parameters=False,
    ),
    "demo": Layout(
        name="demo",
        title="Synthetic stories",
        model="minilm",
        family="bert",
        columns=(
            Column("story_nli", "Story NLI", ("accuracy",), "Acc"),
            Column("story_qa", "Story QA", ("f1",), "F1"),
            STORY_SUMMARY,
        ),
        rows=(Row("lora", 8), Row("wlora", 8, 5)),
        targets=("qkv", "attention", "all", "release"),
        ranks=(8,),
        average=False,
        seeds=1,
    ),
}
