"""`WLoRACallback`: a Trainer script gives the adapters and losses of the runner, resumes, and fails loudly without a cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import wlora
from tests.conftest import TINY, compose
from wlora.config.identity import stream_seed
from wlora.errors import ConfigError, RunFault
from wlora.experiment.shared_inputs import SharedInputs
from wlora.methods.training_data import Phase
from wlora.models.source import locate
from wlora.storage.records import RecordStore
from wlora.training.batch_order import step_batches

SMALL = ["task.max_train_rows=64", "task.max_eval_rows=8", "dropout=0", "precision=fp32", "lr=5e-3", "targets=all"]
STILL = [f"+model.architecture.{name}_dropout_prob=0" for name in ("hidden", "attention_probs")]
STEPS = 16  # two epochs of 64 rows in batches of 8


class Order:
    """The runner's batches of rows, epoch after epoch."""

    def __init__(self, lengths: list[int], seed: int) -> None:
        phases = [Phase(range(len(lengths)), STEPS)]
        order = stream_seed(seed, "order")
        self.steps = list(step_batches(phases, lengths, batch_size=8, accumulation_steps=1, seed=order))
        self.epoch = 0

    def __len__(self) -> int:
        return STEPS // 2

    def __iter__(self) -> Iterator[list[int]]:
        for (batch,) in self.steps[self.epoch * len(self) :][: len(self)]:
            yield batch


class Loader(DataLoader[Any]):
    """Tells the order the epoch, as the Trainer tells the loader."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, Order)
        self.batch_sampler.epoch = epoch


class Script:
    """The model and rows of a run, to be trained by a script."""

    def __init__(self, *words: str) -> None:
        self.config = compose(*TINY, *SMALL, *STILL, *words)
        source, shared = locate(self.config.model), SharedInputs(keep=False)
        self.material = shared.material(self.config, source)
        seed, device = stream_seed(self.config.seed, "init"), torch.device("cpu")
        self.model = shared.model(
            self.config, source, self.material, seed=seed, own=True, device=device, dtype=torch.float32
        )
        features = self.material.data.train
        self.rows, self.lengths = features.rows(list(range(len(features)))), features.lengths

    def collate(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = self.material.task.collate(rows, self.material.tokenizer)
        return batch

    def trainer(self, folder: Path, callbacks: list[TrainerCallback], **options: Any) -> Any:
        """Return a Trainer that draws the runner's batches and keeps its losses."""
        script = self

        class Replay(Trainer):  # type: ignore[misc]
            losses: list[float]

            def get_train_dataloader(self) -> Any:
                order = Order(script.lengths, script.config.seed)
                return Loader(script.rows, batch_sampler=order, collate_fn=script.collate)  # type: ignore[arg-type]

            def training_step(self, *words: Any, **more: Any) -> Any:
                loss = super().training_step(*words, **more)
                self.losses.append(float(loss))
                return loss

        settings: dict[str, Any] = {
            "num_train_epochs": 2,
            "learning_rate": 5e-3,
            "warmup_steps": 1,
            "weight_decay": 0.01,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        args = TrainingArguments(output_dir=str(folder), **settings | options)
        trainer = Replay(
            model=self.model,
            args=args,
            train_dataset=self.rows,
            eval_dataset=self.rows,
            data_collator=self.collate,
            callbacks=callbacks,
        )
        trainer.losses = []
        return trainer


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("wlora", {"k": 3, "select_steps": 4}),
        ("wlora_plus", {"k": 3, "select_steps": 6}),
        pytest.param("adalora", {}, marks=pytest.mark.slow),
        pytest.param("increlora", {}, marks=pytest.mark.slow),
    ],
)
def test_a_trainer_script_is_the_run(
    method: str, options: dict[str, Any], run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    words = [f"{'' if key == 'k' else 'method.'}{key}={value}" for key, value in options.items()]
    record = run_tiny(*SMALL, *STILL, f"method={method}", "rank=2", "warmup=1", *words)
    expected = [point["loss"] for point in RecordStore(tmp_path).read_curve(record) if "loss" in point]
    script = Script()
    length = {"steps": STEPS, "steps_per_epoch": STEPS // 2} if method == "increlora" else {}
    handle = wlora.attach(script.model, method, targets="all", rank=2, dropout=0.0, **options, **length)
    trainer = script.trainer(tmp_path / "trainer", [wlora.WLoRACallback(handle)])
    trainer.train()
    assert len(expected) == STEPS == len(trainer.losses)
    assert trainer.losses == pytest.approx(expected, abs=1e-5)
    summary = handle.summary()
    assert list(summary["adapters"]) == [adapter["name"] for adapter in record.adapters]
    for adapter in record.adapters:
        found = summary["adapters"][adapter["name"]]
        assert found["rank"] == adapter["rank"]
        assert found["omega"] == (None if adapter["omega"] is None else pytest.approx(adapter["omega"], abs=1e-4))
    assert summary["parameters"]["adapter_final"] == record.parameters["adapter_final"]
    assert [event.kind for event in handle.events] == [event["kind"] for event in record.events]
    assert trainer.args.max_grad_norm == 1.0


def test_accumulated_micro_batches_are_averaged(tmp_path: Path) -> None:
    def train(micro: int) -> tuple[list[float], dict[str, Any]]:
        script = Script()
        handle = wlora.attach(script.model, targets="all", rank=2, dropout=0.0, k=3, select_steps=4)
        size = {"per_device_train_batch_size": 8 // micro, "gradient_accumulation_steps": micro, "max_steps": 6}
        args = TrainingArguments(
            output_dir=str(tmp_path / str(micro)),
            learning_rate=5e-3,
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            **size,
        )
        trainer = Trainer(script.model, args, script.collate, script.rows, callbacks=[wlora.WLoRACallback(handle)])
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return losses, handle.summary()["adapters"]

    (whole, kept), (parts, also) = train(1), train(2)
    assert parts == pytest.approx(whole, abs=1e-3) and kept.keys() == also.keys()
    for name, adapter in kept.items():
        assert adapter["omega"] == pytest.approx(also[name]["omega"], abs=1e-4)


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_a_training_resumes_from_the_trainers_checkpoint(at: int, tmp_path: Path) -> None:
    def begin(**options: Any) -> tuple[Any, Any]:
        script = Script()
        # It cuts at step 4 and then gives the three that stay a higher rank.
        handle = wlora.attach(script.model, "wlora_plus", targets="all", rank=2, dropout=0.0, k=3, select_steps=6)
        return handle, script.trainer(tmp_path / "run", [wlora.WLoRACallback(handle)], **options)

    handle, whole = begin(save_strategy="steps", save_steps=at)
    whole.train()
    again, rest = begin()
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{at}"))
    assert rest.losses == pytest.approx(whole.losses[at:], abs=1e-6)
    assert again.summary() == handle.summary() and again.done == STEPS
    for name, value in handle.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_the_schedule_of_the_trainer_applies_to_all_but_omega(tmp_path: Path) -> None:
    script = Script()
    handle = wlora.attach(script.model, k=3, targets="all", select_steps=8, lr_omega=0.7)
    seen = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, *_: Any, **known: Any) -> None:
            rates = {rule: optimizer.param_groups[0]["lr"] for rule, optimizer in handle._optimizers._rules.items()}
            seen.append((rates, len(known["optimizer"].state)))

    options = {"max_steps": 4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    trainer = script.trainer(tmp_path, [wlora.WLoRACallback(handle), Watch()], **options)
    with pytest.raises(RunFault, match=r"the cut was never made: 4 optimiser steps of 4 are done, and T=8"):
        # A selection that is longer than the training is refused before; this one has been planned for more steps.
        handle.method.plan = lambda steps: None  # type: ignore[method-assign]
        trainer.train()
    assert [rates["adamw"] for rates, _ in seen] == pytest.approx([0.0, 2.5e-3, 5e-3, 5e-3])
    assert [rates["sgd"] for rates, _ in seen] == [0.7] * 4
    assert [count for _, count in seen] == [0] * 4  # the Trainer's own optimiser never sees a gradient


def test_arguments_that_do_not_go_together_are_refused_before_the_first_step(tmp_path: Path) -> None:
    script = Script()
    numbers = itertools.count()

    def refused(method: str = "wlora", **options: Any) -> str:
        script.model = Script().model
        handle = wlora.attach(script.model, method, targets="all")
        trainer = script.trainer(tmp_path / str(next(numbers)), [wlora.WLoRACallback(handle)], **options)
        with pytest.raises(ConfigError) as caught:
            trainer.train()
        assert trainer.losses == [] and str(caught.value).count("\n") < 2
        return str(caught.value)

    assert "optim=sgd: allowed is adamw_torch | adamw_torch_fused" in refused(optim="sgd")
    assert "adam_beta1=0.8: allowed is 0.9" in refused(adam_beta1=0.8)
    best = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True, "eval_steps": 500}
    assert "load_best_model_at_end=True: allowed is False" in refused(**best)
    assert "at least 4, as a selection takes 3" in refused(max_steps=2)
    handle = wlora.attach(Script().model)
    with pytest.raises(ConfigError, match="another model"):
        script.model = Script().model
        script.trainer(tmp_path / "other", [wlora.WLoRACallback(handle)]).train()


def test_methods_that_look_at_rows_get_those_of_the_trainer(tmp_path: Path) -> None:
    script = Script()
    handle = wlora.attach(script.model, "lora_drop", targets="all", rank=2)
    script.trainer(tmp_path, [wlora.WLoRACallback(handle)]).train()
    assert [event.kind for event in handle.events] in (["cut"], ["share"])
    assert [sum(phase.steps for phase in handle.phases), len(handle.phases[1].rows)] == [STEPS, 64]


class Stream(IterableDataset[Any]):
    """Rows without a length and an order, as of a streamed data set."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


class Frame:
    """Rows that end with KeyError, as of a pandas frame, and that only the collator encodes."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = dict(enumerate(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any]:
        return (self.rows[index],)


@pytest.mark.parametrize("form", ["stream", "frame"])
def test_rows_of_any_form_train_with_methods_that_do_not_look_at_them(form: str, tmp_path: Path) -> None:
    script = Script()
    handle = wlora.attach(script.model, k=3, targets="all", select_steps=4)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(
        model=script.model,
        args=args,
        train_dataset=Stream(script.rows) if form == "stream" else Frame(script.rows),  # type: ignore[arg-type]
        data_collator=script.collate if form == "stream" else lambda rows: script.collate([row for (row,) in rows]),
        callbacks=[wlora.WLoRACallback(handle)],
    )
    trainer.train()
    assert handle.done == 6 and len(handle.summary()["adapters"]) == 3
    with pytest.raises(ConfigError, match="rows: row 0 is a tuple: allowed are encoded rows"):
        wlora.attach(Script().model, "lora_drop").begin(6, lr=1e-3, rows=Frame(script.rows), collate=script.collate)  # type: ignore[arg-type]


def test_increlora_trains_under_autocast(tmp_path: Path) -> None:
    script = Script()
    handle = wlora.attach(script.model, "increlora", targets="all", rank=2, steps=STEPS, steps_per_epoch=STEPS // 2)
    script.trainer(tmp_path, [wlora.WLoRACallback(handle)], bf16=True).train()
    assert any(event.kind == "grow" for event in handle.events)


@pytest.mark.parametrize("method", ["tied_lora", "vera", pytest.param("vb_lora", marks=pytest.mark.slow)])
def test_adapters_with_common_parameters_are_saved_and_resumed(method: str, tmp_path: Path) -> None:
    def begin(**options: Any) -> tuple[Any, Any]:
        script = Script()
        handle = wlora.attach(script.model, method, targets="all", dropout=0.0)
        return handle, script.trainer(tmp_path / "run", [wlora.WLoRACallback(handle)], **options)

    handle, whole = begin(save_strategy="steps", save_steps=4, max_steps=8)
    whole.train()
    again, rest = begin(max_steps=8)
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert rest.losses == pytest.approx(whole.losses[4:], abs=1e-6) and again.summary() == handle.summary()


def test_an_optimiser_and_a_scheduler_of_ones_own_are_refused_or_followed(tmp_path: Path) -> None:
    script = Script()
    seen: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, *_: Any, **known: Any) -> None:
            seen.append(handle._optimizers._rules["adamw"].param_groups[0]["lr"])

    for rate in (1e-3, 5e-3):
        script.model = Script().model
        handle = wlora.attach(script.model, "lora", targets="all")
        trainer = script.trainer(tmp_path, [wlora.WLoRACallback(handle), Watch()], max_steps=3)
        optimizer = torch.optim.AdamW(handle.model.parameters(), lr=rate)
        trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 9)
        if rate != 5e-3:
            with pytest.raises(ConfigError, match="optimizers: the optimiser has learning_rate=0.001: allowed is"):
                trainer.train()
            continue
        trainer.train()
    assert seen == pytest.approx([2.5e-3] * 3), "not the linear schedule of the arguments"


def test_clipping_is_not_lost_by_an_interrupt(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **known: Any) -> None:
            raise KeyboardInterrupt

    script = Script()
    handle = wlora.attach(script.model, "lora", targets="all")
    trainer = script.trainer(tmp_path, [wlora.WLoRACallback(handle), Interrupt()], max_grad_norm=0.3)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle = wlora.attach(Script().model, "lora", targets="all")
    callback = wlora.WLoRACallback(handle)
    later = script.trainer(tmp_path, [callback])
    later.model, later.args = handle.model, trainer.args
    later.train()
    assert handle._max_grad_norm == 0.3 and trainer.args.max_grad_norm == 0.3
