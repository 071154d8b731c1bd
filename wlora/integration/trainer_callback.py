"""`WLoRACallback`: use a handle with transformers' Trainer.

The Trainer builds an AdamW over all trained parameters. It must not update ω, and it would not be rebuilt after a cut.
Therefore the handle's own optimisers take every step, just before the Trainer's optimiser, which then finds no gradients.
The Trainer's optimiser only provides the learning-rate schedule and stores the handle's state in checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from wlora.adapters.layer import AdaptedLinear
from wlora.console import notice
from wlora.errors import ConfigError, wrong_value
from wlora.integration.handle import Handle
from wlora.methods.base import Method
from wlora.training.optimizers import linear_schedule

_STATE = "wlora"  # the key of the handle's state in the first group of the Trainer's optimiser
_OPTIMS = ("adamw_torch", "adamw_torch_fused")
_CLIPPING = "_wlora_max_grad_norm"  # where the arguments keep the user's clipping, which an interrupt must not lose


class WLoRACallback(TrainerCallback):  # type: ignore[misc]
    """Train a handle's model with transformers' Trainer: `Trainer(model, args, callbacks=[WLoRACallback(handle)])`.

    Learning rate, schedule, weight decay, clipping and length are those of the `TrainingArguments`. ω has its own optimiser
    without schedule and clipping. The Trainer's checkpoints contain the state of the handle, so
    `trainer.train(resume_from_checkpoint=...)` also works after the cut. Methods that use training rows get the Trainer's
    training set.

    Args:
        handle: the result of `wlora.attach` for the Trainer's model.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        # The Trainer loads a checkpoint's weights into newly attached adapters before any event of a callback.
        handle.model.register_load_state_dict_pre_hook(_fit_checkpoint)
        handle.model.register_state_dict_post_hook(_separate_shared)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **known: Any) -> None:
        """Begin the handle's training, or continue from the state in the Trainer's checkpoint.

        Raises:
            ConfigError: an argument of the Trainer is incompatible with this callback.
        """
        optimizer: Any = getattr(known["optimizer"], "optimizer", known["optimizer"])
        self._check(args, known["model"], optimizer)
        loader = known["train_dataloader"]
        per_epoch = -(-len(loader) // args.gradient_accumulation_steps) if has_length(loader) else None
        warmup = args.get_warmup_steps(state.max_steps)
        linear = _is_linear(known["lr_scheduler"], warmup=warmup, total=state.max_steps)
        self._factor = None if linear else (lambda: optimizer.param_groups[0]["lr"] / args.learning_rate)
        rows = getattr(loader, "dataset", None)
        max_grad_norm = args.max_grad_norm or getattr(args, _CLIPPING, 0.0)
        self.handle.begin(
            state.max_steps,
            lr=args.learning_rate,
            warmup=warmup,
            steps_per_epoch=per_epoch,
            weight_decay=args.weight_decay,
            max_grad_norm=max_grad_norm,
            rows=rows if has_length(rows) else None,
            collate=loader.collate_fn,
        )
        if rows is not None and any(len(phase.rows) < len(rows) for phase in self.handle.phases):
            notice(f"method={self.handle.name} requests parts of the rows (handle.phases), but the Trainer draws from all")
        if saved := optimizer.param_groups[0].get(_STATE):
            self.handle.load_state_dict(saved)
        if self.handle.done != state.global_step:
            raise ConfigError(
                f"the Trainer is at step {state.global_step}, the handle at {self.handle.done}: allowed is a checkpoint "
                "that was written with WLoRACallback and save_only_model=False"
            )
        optimizer.register_state_dict_post_hook(self._add_state)
        # The Trainer would clip all gradients including those of ω. The handle clips all except those of ω.
        setattr(args, _CLIPPING, max_grad_norm)
        args.max_grad_norm = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **known: Any
    ) -> None:
        """Take the handle's step. The Trainer's optimiser then finds no gradients."""
        self.handle.step(self._factor() if self._factor else None)
        known["optimizer"].zero_grad(set_to_none=True)  # also the gradients of adapters that were just removed

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **known: Any) -> None:
        """Check that the method has made its cut.

        Raises:
            RunFault: the training ended before the cut.
        """
        args.max_grad_norm = getattr(args, _CLIPPING)
        self.handle.check_settled()

    def _add_state(self, optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
        content["param_groups"][0][_STATE] = self.handle.state_dict()

    def _check(self, args: TrainingArguments, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Raise an error for arguments of the Trainer that would be ignored or give other results."""
        if model is not self.handle.model:
            raise ConfigError("WLoRACallback: the Trainer has another model: allowed is the one of wlora.attach")
        if args.world_size > 1 or args.n_gpu > 1 or args.deepspeed or args.fsdp:
            raise wrong_value(
                "world_size", max(args.world_size, args.n_gpu), "1: only wlora run supports cuts with several processes"
            )
        optim = str(getattr(args.optim, "value", args.optim))
        if optim not in _OPTIMS or not isinstance(optimizer, torch.optim.AdamW):
            raise wrong_value("optim", optim, f"{' | '.join(_OPTIMS)}: the handle uses its own AdamW")
        shared = ("adam_beta1", "adam_beta2", "adam_epsilon")
        for key, only in zip(shared, (*optimizer.defaults["betas"], optimizer.defaults["eps"]), strict=True):
            default = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}[key]
            if only != default:
                raise wrong_value(key, only, f"{default}, as in a run")
        for group in optimizer.param_groups:
            for key, own, allowed in (
                ("learning_rate", group.get("initial_lr", group["lr"]), (args.learning_rate,)),
                ("weight_decay", group["weight_decay"], (args.weight_decay, 0.0)),
            ):
                if own not in allowed:
                    raise ConfigError(
                        f"optimizers: the optimiser has {key}={own}: allowed is that of the TrainingArguments, "
                        f"{getattr(args, key)}: the handle uses its own AdamW"
                    )
        for key in ("fp16", "auto_find_batch_size"):
            if getattr(args, key, False):
                raise wrong_value(key, "True", "False; bf16=True works" if key == "fp16" else "False")
        method = type(self.handle.method)
        changes = method.before_step is not Method.before_step or method.after_step is not Method.after_step
        if args.load_best_model_at_end and changes:
            raise wrong_value(
                "load_best_model_at_end",
                "True",
                f"False: method={self.handle.name} changes the model's structure during training",
            )


def _is_linear(scheduler: Any, *, warmup: int, total: int) -> bool:
    """Tell whether a scheduler is the linear one of a run, which the handle computes itself, for each group of its own."""
    rates = getattr(getattr(scheduler, "scheduler", scheduler), "lr_lambdas", [])
    steps = sorted({0, 1, warmup // 2, warmup, warmup + 1, (warmup + total) // 2, total - 1})
    expected = [linear_schedule(step, warmup=warmup, total=total) for step in steps]
    return bool(rates) and all(abs(rates[0](s) - own) < 1e-9 for s, own in zip(steps, expected, strict=True))


def _separate_shared(module: nn.Module, content: dict[str, Tensor], *_: Any) -> None:
    """Copy tensors that several adapters share: the Trainer's safetensors refuse them. transformers knows its own (tied)."""
    seen: set[tuple[int, torch.Size]] = set()
    tied = getattr(module, "all_tied_weights_keys", {})
    for key, tensor in content.items():
        if key not in tied and key not in tied.values():
            own = tensor.data_ptr(), tensor.shape
            content[key] = tensor.clone() if own in seen else tensor
            seen.add(own)


def _fit_checkpoint(module: nn.Module, content: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Adapt a checkpoint's weights to newly attached adapters. After a cut, it has plain modules or other shapes.

    Weights that are left out here are in the handle's state.
    """
    for name, part in module.named_modules():
        if isinstance(part, AdaptedLinear):
            for key, tensor in list(part.adapter.state_dict().items()):
                found = content.get(f"{prefix}{name}.adapter.{key}")
                if found is not None and found.shape != tensor.shape:
                    del content[f"{prefix}{name}.adapter.{key}"]
            for key in part.base.state_dict():
                plain = f"{prefix}{name}.{key}"
                if plain in content:
                    content[f"{prefix}{name}.base.{key}"] = content.pop(plain)
