"""LoRA-drop (Zhou et al., 2024, arXiv 2402.07721): rank adapters by the norm of their outputs on a sample, drop the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wlora.adapters.layer import LowRankAdapter
from wlora.distributed import mean
from wlora.errors import wrong_value
from wlora.methods.base import AdapterMethod, Event, Steps, bound_sum
from wlora.methods.selection import widest
from wlora.methods.training_data import Batch, Phase, TrainingData
from wlora.models.first_token import every_token

MIN_STAGE_STEPS = 50
SCORE_BATCH = 32
IGNORED = -100  # the label of padding


class LoRADrop(AdapterMethod):
    """Stage one trains all adapters on a stratified sample D_s. Then I_i ∝ Σ_{x∈D_s} ‖ΔW_i x_i‖² ranks them.

    The best adapters keep their weights. The others are disconnected; with `share`, they get one new common adapter per
    kind of module instead. Stage two trains on all rows. The LoRA-drop paper leaves these details open; our choices:
    adapters are ranked individually, over all tokens that are not padding; stage one is one pass over D_s (at least 50
    steps, at most a quarter of the run) and counts as part of the run. The 221K parameters in the WeightLoRA paper
    correspond to `keep=0.5 share=false`.

    Args:
        keep: share of adapters that stay, in (0, 1]; ignored with `threshold`.
        threshold: keep the smallest set whose summed importance reaches this share (the authors' T = 0.9), or None.
        share: replace the other adapters by common ones instead of dropping them.
        sample: share of the training rows in D_s.
        stage_steps: optimiser steps of stage one, or None for the default above.
    """

    startable = True

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        keep: float,
        threshold: float | None,
        share: bool,
        sample: float,
        stage_steps: int | None,
    ) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        self.keep, self.threshold, self.share, self.sample = keep, threshold, share, sample
        self.stage_steps = stage_steps

    def plan(self, steps: Steps) -> None:
        """Determine the length of stage one.

        Raises:
            ConfigError: stage one does not leave steps for stage two.
        """
        if self.stage_steps is None:
            one_pass = max(1, round(steps.per_epoch * self.sample))
            self.stage_steps = max(1, min(max(one_pass, MIN_STAGE_STEPS), steps.total // 4))
        if self.stage_steps >= steps.total:
            raise wrong_value(
                "method.stage_steps",
                self.stage_steps,
                f"1 to {steps.total - 1}, as the run has {steps.total} optimiser steps",
            )

    def phases(self, data: TrainingData, steps: int) -> list[Phase]:
        """Train on D_s first, then on all rows."""
        assert self.stage_steps is not None
        self._data = data
        self._sample = data.sample(max(1, round(data.rows * self.sample)), self.generator)
        return [Phase(self._sample, self.stage_steps), Phase(range(data.rows), steps - self.stage_steps)]

    def after_step(self, step: int) -> list[Event]:
        """Select once, at the end of stage one."""
        if step != self.stage_steps:
            return []
        importance = self.importance()
        kept = choose(importance, keep=self.keep, threshold=self.threshold)
        dropped = [name for name in self.adapters if name not in kept]
        if self.share:
            self._share(dropped)
        else:
            for name in dropped:
                self.adapters.disconnect(name)
        return [Event(step, "share" if self.share else "cut", {"kept": kept, "importance": importance})]

    def last_change(self) -> int:
        """Return the end of stage one."""
        return self.stage_steps or 0

    def final_count(self) -> tuple[int, int] | None:
        """Return the bounds for the kept share.

        None with `threshold` or `share`: then the number is known only during the run.
        """
        if self.share or self.threshold is not None:
            return None
        return bound_sum(
            (adapter.count() for adapter in self.adapters.values()), max(1, round(self.keep * len(self.adapters)))
        )

    def _share(self, names: Sequence[str]) -> None:
        """Give all modules of the same kind and shape one new common adapter."""
        common: dict[tuple[str, int, int], LowRankAdapter] = {}
        for name in names:
            A, B = self.adapters[name].A, self.adapters[name].B
            key = (self.adapters.target(name).kind, A.shape[1], B.shape[0])
            if key not in common:
                common[key] = self.make_adapter(A.shape[1], B.shape[0], A.device)
            self.adapters.replace(name, common[key])

    @torch.no_grad()
    def importance(self) -> dict[str, float]:
        """Return I_i, which sum to 1: each adapter's share of the squared outputs over the tokens of D_s."""
        model = self._data.model
        sums = dict.fromkeys(self.adapters, 0.0)
        masks: list[Tensor] = []

        def observe(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                # DeBERTa also sends relative position embeddings through these projections. They are not tokens and are
                # skipped.
                mask = next((mask for mask in masks if output.shape[:-1] == mask.shape), None)
                if mask is not None or not masks:
                    squared = output.to(widest(output.device)).square().sum(-1)
                    sums[name] += float(squared.sum() if mask is None else (squared * mask).sum())

            return hook

        handles = [adapter.register_forward_hook(observe(name)) for name, adapter in self.adapters.items()]
        try:
            with self._data.evaluation_mode(), every_token(model):
                for batch in self._data.batches(self._sample, SCORE_BATCH):
                    batch, masks = _with_masks(batch, generates=bool(model.config.is_encoder_decoder))
                    model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        sums = dict(zip(sums, mean(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist(), strict=True))
        total = sum(sums.values()) or 1.0
        return {name: value / total for name, value in sums.items()}


def _with_masks(batch: Batch, *, generates: bool) -> tuple[Batch, list[Tensor]]:
    """Return a batch and the masks of its tokens, by whose shapes the outputs of modules are told apart.

    The modules of a decoder see the target's tokens, those of an encoder and the keys of cross-attention the source's. A
    target that is as long as the source gets a column of padding, so that the shapes differ.
    """
    masks = [batch["attention_mask"]] if "attention_mask" in batch else []
    labels = batch.get("labels")
    if generates and masks and labels is not None and labels.dim() == 2:
        if labels.shape == masks[0].shape:
            labels = F.pad(labels, (0, 1), value=IGNORED)
        # Without `decoder_input_ids`, the model makes them from the labels.
        batch = {key: value for key, value in batch.items() if key != "decoder_input_ids"} | {"labels": labels}
        masks.append(labels != IGNORED)
    return batch, masks


def choose(importance: dict[str, float], *, keep: float, threshold: float | None) -> Sequence[str]:
    """Return the names to keep: the best share of all, or the smallest set whose importance reaches the threshold."""
    ranked = sorted(importance, key=lambda name: -importance[name])
    if threshold is None:
        return ranked[: max(1, round(keep * len(ranked)))]
    reached = 0.0
    for count, name in enumerate(ranked, start=1):
        reached += importance[name]
        if reached >= threshold - 1e-12:
            return ranked[:count]
    return ranked
