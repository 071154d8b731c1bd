"""DoRA by Liu et al. (2024, arXiv 2402.09353), from PEFT. DoRA by Mao et al. is `method=dynamic_lora`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wlora.methods.base import Setting
from wlora.methods.peft_backed import PeftMethod

if TYPE_CHECKING:
    from peft import PeftConfig


class DoRA(PeftMethod):
    """W′ = m ∘ (W + s·B A) / ‖W + s·B A‖: magnitude and direction of every output row train separately.

    The norm is taken per output row and is a constant in the backward pass. m is initialised to ‖W‖, A and B as in
    LoRA. DoRA is slower than LoRA: every step builds ΔW as a full matrix for the norm, and with dropout the base output
    is computed twice.

    Args:
        rank: components per adapter.
        alpha: numerator of the scale s = alpha / rank.
        dropout: dropout probability on the adapter's input.
    """

    plain_base = True

    def __init__(self, *, rank: int, alpha: float, dropout: float) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def peft_config(self, setting: Setting, widths: list[int]) -> PeftConfig:
        """Return LoRA's configuration with `use_dora`."""
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, use_dora=True)  # type: ignore[arg-type]
