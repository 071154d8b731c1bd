"""VB-LoRA (Li et al., 2024, arXiv 2405.15179), from PEFT: adapters composed of vectors from one shared bank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from wlora.errors import wrong_value
from wlora.methods.base import Setting
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.peft_backed import PeftMethod

if TYPE_CHECKING:
    from peft import PeftConfig

LONGEST = 256


class VBLoRA(PeftMethod):
    """Every sub-vector of A's rows and B's columns is a softmax mixture of the top k vectors of a shared bank.

    The bank and all logits train; the top k are chosen anew in every forward pass. The initial function is close to
    that of the base model, but not equal: bank U(−0.02, 0.02), logits N(0, 0.01), no scale. A trained adapter can be
    stored as the bank plus k indices and k − 1 weights per sub-vector. Records count the trained parameters instead,
    which are more.

    Args:
        rank: components per adapter.
        dropout: dropout probability on the adapter's input.
        num_vectors: number of vectors in the bank.
        vector_length: length of a vector, a divisor of all adapted widths. None means the largest divisor up to 256,
            the authors' length.
        top_k: vectors per mixture.
        lr_bank: learning rate of the bank.
        lr_logits: learning rate of the logits.
    """

    def __init__(
        self,
        *,
        rank: int,
        dropout: float,
        num_vectors: int,
        vector_length: int | None,
        top_k: int,
        lr_bank: float,
        lr_logits: float,
    ) -> None:
        if top_k > num_vectors:
            raise wrong_value("method.top_k", top_k, f"1 to method.num_vectors={num_vectors}")
        self.rank, self.dropout, self.num_vectors, self.top_k = rank, dropout, num_vectors, top_k
        self.vector_length, self.lr_bank, self.lr_logits = vector_length, lr_bank, lr_logits

    def peft_config(self, setting: Setting, widths: list[int]) -> PeftConfig:
        """Return VB-LoRA's configuration.

        Raises:
            ConfigError: the vector length does not divide an adapted width.
        """
        from peft import VBLoRAConfig

        common = math.gcd(*widths)
        length = self.vector_length or max(n for n in range(1, min(common, LONGEST) + 1) if common % n == 0)
        if common % length:
            raise wrong_value("method.vector_length", length, f"a divisor of the adapted widths {widths}")
        return VBLoRAConfig(
            r=self.rank,
            num_vectors=self.num_vectors,
            vector_length=length,
            topk=self.top_k,
            vblora_dropout=self.dropout,
        )

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return the bank and the logits, each with its own learning rate."""
        return [
            ParameterGroup(self.trained("vector_bank"), self.lr_bank),
            ParameterGroup(self.trained("logits"), self.lr_logits),
        ]
