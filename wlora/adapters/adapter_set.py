"""Attach adapters to the modules of a model, and remove them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from wlora.adapters.layer import AdaptedLinear, Adapter, LowRankAdapter
from wlora.models.linears import base_weight, widths
from wlora.models.targets import Target

MakeAdapter = Callable[[int, int, torch.device], LowRankAdapter]


class AdapterSet(Mapping[str, LowRankAdapter]):
    """The adapters in a model by the name of the adapted module, lowest layer first.

    Attaching does not freeze other parameters. Disconnecting restores the plain base module and drops the adapter,
    which then uses no memory or time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._targets: dict[str, Target] = {}

    def attach(self, target: Target, make: MakeAdapter) -> LowRankAdapter:
        """Attach an adapter to the target's module.

        Args:
            target: the module to adapt, of any kind that `wlora.models.linears` knows; quantised modules work, too.
            make: builds the adapter from (d_in, d_out, device).
        """
        base = self._model.get_submodule(target.name)
        device = next(base.parameters()).device
        adapter = make(*widths(base), device)
        self._replace(target.name, AdaptedLinear(base, adapter))
        self._targets[target.name] = target
        return adapter

    def base(self, name: str) -> nn.Module:
        """Return the frozen module to which an adapter is attached."""
        return self._adapted(name).base

    def disconnect(self, name: str) -> None:
        """Remove an adapter and restore the unchanged base module."""
        self._replace(name, self._adapted(name).base)
        del self._targets[name]

    def fold(self, name: str) -> None:
        """Add ΔW to the base's weight and disconnect the adapter.

        Raises:
            TypeError: the base weight is not floating-point.
        """
        adapted = self._adapted(name)
        weight = base_weight(adapted.base)
        if weight is None:
            raise TypeError(f"{name}: an adapter can be merged into a floating-point weight only")
        with torch.no_grad():
            weight.add_(adapted.adapter.delta_weight().to(weight.dtype))
        self.disconnect(name)

    def replace(self, name: str, adapter: LowRankAdapter) -> None:
        """Replace an adapter by another one, which may be shared by several modules."""
        self._adapted(name).adapter = adapter

    @contextmanager
    def only(self, names: Collection[str]) -> Iterator[None]:
        """Context manager: only the named adapters are connected in the block. The others are restored afterwards."""
        targets = dict(self._targets)
        taken = {name: self[name] for name in targets if name not in names}
        for name in taken:
            self.disconnect(name)
        try:
            yield
        finally:
            for name, adapter in taken.items():
                self._replace(name, AdaptedLinear(self._model.get_submodule(name), adapter))
            self._targets = targets

    def target(self, name: str) -> Target:
        """Return the target to which an adapter is attached."""
        return self._targets[name]

    @property
    def lowest_layer(self) -> int | None:
        """Index of the lowest layer with an adapter, where the backward pass ends. None without adapters."""
        return min((target.layer for target in self._targets.values()), default=None)

    def count(self) -> int:
        """Return the number of counted elements of all connected adapters. Shared parameters count once."""
        return count_elements(self.values())

    def __getitem__(self, name: str) -> LowRankAdapter:
        if name not in self._targets:
            raise KeyError(name)
        return self._adapted(name).adapter

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._targets))

    def __len__(self) -> int:
        return len(self._targets)

    def _adapted(self, name: str) -> AdaptedLinear:
        module = self._model.get_submodule(name)
        assert isinstance(module, AdaptedLinear), name
        return module

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, module)


def count_elements(adapters: Iterable[Adapter]) -> int:
    """Return the number of counted elements of adapters. Shared parameters count once."""
    return sum(p.numel() for p in {p for adapter in adapters for p in adapter.counted()})
