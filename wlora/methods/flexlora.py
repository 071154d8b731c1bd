"""FlexLoRA (Bai et al., 2024, arXiv 2402.11505): federated LoRA; the server averages ΔW and redistributes its SVD.

The WeightLoRA paper's Table 1 cites Wei et al. (2024) for this row, which is Flexora (`method=flexora`). The paper's
description (federated, SVD, one rank per client) and its 442K parameters match Bai et al.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wlora.errors import ConfigError, wrong_value
from wlora.methods.base import AdapterMethod, Event, Setting, Steps
from wlora.methods.training_data import Phase, TrainingData
from wlora.models.heads import head_parameters

Factors = tuple[Tensor, Tensor]
DEFAULT_ROUNDS = 8


class FlexLoRA(AdapterMethod):
    """Simulated clients train in turns.

    After each round the server computes ΔW = Σ_k w_k·s_k·B_k A_k and its SVD U Σ Vᵀ.

    A client of rank r starts its next turn from A = V_rᵀ and B = U_r Σ_r·(r/alpha). w_k is the client's share of the
    rows. The head is averaged with the same weights. Optimiser state is discarded between turns. At the end of the run
    ΔW is truncated to `rank`. No publication gives settings for GLUE: the numbers of clients and rounds and the data
    split are our choice. All turns together are as long as the run of another method.

    Args:
        rank: rank of the final adapters, and of every client unless `ranks` is given.
        clients: number of clients; rows are assigned at random, in equal parts.
        rounds: rounds of redistribution; None means 8, or fewer if the run is too short.
        ranks: one rank per client, or None.
    """

    def __init__(
        self, *, rank: int, alpha: float, dropout: float, clients: int, rounds: int | None, ranks: Sequence[int] | None
    ) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        if ranks is not None and len(ranks) != clients:
            raise ConfigError(f"method.ranks={list(ranks)}: allowed is one rank for each of the {clients} clients")
        self.clients, self.rounds = clients, rounds
        self.ranks = [rank] * clients if ranks is None else list(ranks)

    def plan(self, steps: Steps) -> None:
        """Determine at which steps turns end. Every turn has at least one step.

        Raises:
            ConfigError: the run has fewer steps than turns.
        """
        rounds = max(1, min(DEFAULT_ROUNDS, steps.total // self.clients)) if self.rounds is None else self.rounds
        turns = rounds * self.clients
        if turns > steps.total:
            raise wrong_value(
                "method.rounds × method.clients", turns, f"1 to {steps.total}, as the run has {steps.total} optimiser steps"
            )
        self._ends = [steps.total * (turn + 1) // turns for turn in range(turns)]

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach adapters. The first turn starts from LoRA's initialisation."""
        super().attach(model, setting)
        self._head = head_parameters(model)
        self._global: dict[str, Factors] | None = None
        self._first = {name: a.A.detach().clone() for name, a in self.adapters.items()}
        self._global_head = {name: p.detach().clone() for name, p in self._head.items()}
        self._updates: list[dict[str, Factors]] = []
        self._heads: list[dict[str, Tensor]] = []

    def phases(self, data: TrainingData, steps: int) -> list[Phase]:
        """Distribute the rows among the clients. Clients train in turns.

        Raises:
            ConfigError: there are more clients than training rows.
        """
        if self.clients > data.rows:
            raise ConfigError(f"method.clients={self.clients}: allowed is 1 to {data.rows}, the training rows")
        order = torch.randperm(data.rows, generator=self.generator).tolist()
        shards = [sorted(order[client :: self.clients]) for client in range(self.clients)]
        self._weights = [len(shard) / data.rows for shard in shards]
        self._load(0)
        lengths = [end - start for start, end in zip([0, *self._ends], self._ends, strict=False)]
        return [Phase(shards[turn % self.clients], length) for turn, length in enumerate(lengths)]

    def after_step(self, step: int) -> list[Event]:
        """End a client's turn: load the next client's state. At the end of a round, the server also redistributes."""
        if step not in self._ends:
            return []
        turn = self._ends.index(step)
        client = turn % self.clients
        self._collect()
        if client == self.clients - 1:
            self._aggregate()
        last = turn == len(self._ends) - 1
        self._load(None if last else (client + 1) % self.clients)
        return [Event(step, "redistribute" if client == self.clients - 1 else "hand over", {"client": client}, reset=True)]

    def last_change(self) -> int:
        """Return the end of the last turn, which is the end of the run."""
        return self._ends[-1]

    @torch.no_grad()
    def _collect(self) -> None:
        """Store a client's update: s·B and A of every adapter, and the head."""
        update = {name: (a.scale * a.B.detach().clone(), a.A.detach().clone()) for name, a in self.adapters.items()}
        self._updates.append(update)
        self._heads.append({name: p.detach().clone() for name, p in self._head.items()})

    @torch.no_grad()
    def _aggregate(self) -> None:
        """Average the updates and heads of a round."""
        self._global = {name: decompose([update[name] for update in self._updates], self._weights) for name in self.adapters}
        for name in self._global_head:
            parts = [weight * head[name] for weight, head in zip(self._weights, self._heads, strict=True)]
            self._global_head[name] = torch.stack(parts).sum(0)
        self._updates, self._heads = [], []

    @torch.no_grad()
    def _load(self, client: int | None) -> None:
        """Load the global state at a client's rank; None loads the final model at `rank`."""
        rank = self.rank if client is None else self.ranks[client]
        for name, adapter in self.adapters.items():
            adapter.scale = self.alpha / rank
            if self._global is None:
                A = self._first[name][:rank].to(adapter.A.device)  # drawn before the model moved to its device
                if rank > len(A):
                    extra = torch.randn(rank - len(A), A.shape[1], generator=self.generator).to(A) / A.shape[1] ** 0.5
                    A = torch.cat([A, extra])
                B = adapter.B.new_zeros(adapter.B.shape[0], rank)
            else:
                left, right = self._global[name]
                A, B = _fit(right, rank, 0), _fit(left, rank, 1) / adapter.scale
            adapter.A, adapter.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        for name, p in self._head.items():
            p.copy_(self._global_head[name])


@torch.no_grad()
def decompose(updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return (UΣ, Vᵀ) of Σ_k w_k·L_k R_k in decreasing order of singular values. The d_out×d_in sum is not built.

    Args:
        updates: (L, R) per client, with shapes [d_out, r_k] and [r_k, d_in].
        weights: one per client, summing to 1.

    Returns:
        UΣ of shape [d_out, m] and Vᵀ of shape [m, d_in], with m ≤ Σ r_k.
    """
    left = torch.cat([weight * L for weight, (L, _) in zip(weights, updates, strict=True)], dim=1)
    right = torch.cat([R for _, R in updates], dim=0)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(r_left @ r_right.T)
    count = len(S)
    return q_left @ (U[:, :count] * S), Vh[:count] @ q_right.T


def _fit(matrix: Tensor, rank: int, dim: int) -> Tensor:
    """Truncate a factor to `rank`, or pad it with zeros, along dimension `dim`."""
    matrix = matrix.narrow(dim, 0, min(rank, matrix.shape[dim]))
    missing = rank - matrix.shape[dim]
    if missing == 0:
        return matrix
    shape = list(matrix.shape)
    shape[dim] = missing
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim)
