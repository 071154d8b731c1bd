"""Methods that the PEFT library has and this project does not study, behind the interface of all others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from wlora.adapters.layer import Adapter
from wlora.adapters.peft_format import fold_peft
from wlora.errors import ConfigError
from wlora.methods.base import Method, Setting
from wlora.methods.parameter_groups import ParameterGroup

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class PeftAdapter:
    """What PEFT put around one linear, as counts and records see it: its trained parameters, shared ones included.

    Args:
        layer: PEFT's module, which holds the base linear as `base_layer`.
        whole: PEFT's model around all of them.
    """

    omega = None

    def __init__(self, layer: nn.Module, whole: PeftModel) -> None:
        self._layer, self.whole = layer, whole

    @property
    def rank(self) -> int:
        """Number of components."""
        ranks: dict[str, int] = self._layer.r  # type: ignore[assignment]
        return ranks["default"]

    def counted(self) -> list[nn.Parameter]:
        """Return everything that trains."""
        return list(self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all its parameters, none of which belongs to the base."""
        return self.named("")

    def named(self, part: str) -> Iterator[nn.Parameter]:
        """Return its parameters whose names in PEFT's layer contain `part`."""
        named = self._layer.named_parameters()
        return (p for name, p in named if part in name and not name.startswith("base_layer."))


class PeftMethod(Method):
    """A policy without a schedule whose adapters are made by PEFT."""

    def peft_config(self, setting: Setting, widths: list[int]) -> PeftConfig:
        """Return PEFT's description of the adapters; `widths` are the inputs and outputs of the targets.

        `target_modules` is filled in by `attach`.
        """
        raise NotImplementedError

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Let PEFT put its layers in the place of the targets.

        Raises:
            ConfigError: PEFT refuses the targets or the settings.
        """
        from peft import get_peft_model

        super().attach(model, setting)
        modules = [model.get_submodule(target.name) for target in setting.targets]
        widths = sorted({int(width) for m in modules for width in (m.in_features, m.out_features)})  # type: ignore[arg-type]
        config = self.peft_config(setting, widths)
        config.target_modules = [target.name for target in setting.targets]
        try:
            with warnings.catch_warnings():
                # Of names that transformers has deprecated and PEFT still asks for.
                warnings.simplefilter("ignore", FutureWarning)
                whole = get_peft_model(model, config)  # type: ignore[arg-type]  # it changes the model in place
        except (ValueError, TypeError) as error:
            raise ConfigError(f"method={type(self).__name__}: PEFT says: {error}") from error
        self._model = model
        names = [target.name for target in setting.targets]
        self._attached = {name: PeftAdapter(model.get_submodule(name), whole) for name in names}

    def attached(self) -> Mapping[str, Adapter]:
        """Return PEFT's adapters, by module name."""
        return self._attached

    def to_peft(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return PEFT's own description of its adapters."""
        from peft import get_peft_model_state_dict

        whole = next(iter(self._attached.values())).whole
        config = whole.peft_config["default"].to_dict()
        # Sets have no order, and JSON no sets.
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        return plain, get_peft_model_state_dict(whole)

    def fold(self) -> None:
        """Let PEFT merge its adapters, and put the plain linears back."""
        fold_peft(self._model)
        self._attached = {}

    def trained(self, part: str = "") -> list[nn.Parameter]:
        """Return the parameters of the adapters whose names contain `part`, shared ones once."""
        found = {p: None for adapter in self._attached.values() for p in adapter.named(part)}
        return list(found)

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return all that PEFT trains, at the run's rate."""
        return [ParameterGroup(self.trained(), lr)]
