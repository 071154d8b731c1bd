"""VeRA (Kopiczko et al., 2023, arXiv 2310.11454), from PEFT: shared frozen random matrices and trained scaling vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wlora.methods.base import Setting
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.peft_backed import PeftMethod

if TYPE_CHECKING:
    from peft import PeftConfig


class VeRA(PeftMethod):
    """h = W x + Λ_b B Λ_d A x. A and B are drawn once from the run's seed and are shared by all adapters.

    Smaller linear modules use slices of the shared matrices. Each adapter trains Λ_d (`rank` values, initially 0.1) and
    Λ_b (d_out values, initially 0). There is no alpha.

    Args:
        rank: components of the shared matrices; much larger than LoRA's rank.
        dropout: dropout probability on the adapter's input.
        lr_vectors: learning rate of the vectors; None means the run's.
    """

    def __init__(self, *, rank: int, dropout: float, lr_vectors: float | None) -> None:
        self.rank, self.dropout, self.lr_vectors = rank, dropout, lr_vectors

    def peft_config(self, setting: Setting, widths: list[int]) -> PeftConfig:
        """Return VeRA's configuration."""
        from peft import VeraConfig

        seed = int(torch.randint(2**31, (1,), generator=setting.generator))
        return VeraConfig(r=self.rank, vera_dropout=self.dropout, projection_prng_key=seed)

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return the scaling vectors."""
        return [ParameterGroup(self.trained(), self.lr_vectors or lr)]
