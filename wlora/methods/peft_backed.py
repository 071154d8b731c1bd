"""Base class for methods that the PEFT library implements."""

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
from wlora.models.linears import is_transposed, widths

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class PeftAdapter:
    """PEFT's adapter on one linear module: the trained parameters, including those shared with other adapters.

    Args:
        layer: PEFT's module, which holds the base linear as `base_layer`.
        whole: PEFT's model, which contains all its adapters.
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
        """Return all trained parameters."""
        return list(self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all parameters except those of the base."""
        return self.named("")

    def named(self, part: str) -> Iterator[nn.Parameter]:
        """Return the parameters whose names in PEFT's layer contain `part`."""
        named = self._layer.named_parameters()
        return (p for name, p in named if part in name and not name.startswith("base_layer."))


class PeftMethod(Method):
    """A method without a schedule whose adapters are built by PEFT."""

    def peft_config(self, setting: Setting, widths: list[int]) -> PeftConfig:
        """Return PEFT's configuration of the adapters.

        Args:
            setting: the model and the run.
            widths: the distinct input and output widths of the targets.

        Returns:
            The configuration; `attach` fills in `target_modules`.
        """
        raise NotImplementedError

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Let PEFT replace the targets by its layers.

        Raises:
            ConfigError: PEFT rejects the targets or the settings.
        """
        from peft import get_peft_model

        super().attach(model, setting)
        modules = [model.get_submodule(target.name) for target in setting.targets]
        config = self.peft_config(setting, sorted({width for module in modules for width in widths(module)}))
        if hasattr(config, "fan_in_fan_out"):
            config.fan_in_fan_out = all(map(is_transposed, modules))
        config.target_modules = [target.name for target in setting.targets]
        try:
            with warnings.catch_warnings():
                # PEFT still uses names that transformers has deprecated.
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
        """Return the adapters as PEFT describes them."""
        from peft import get_peft_model_state_dict

        whole = next(iter(self._attached.values())).whole
        config = whole.peft_config["default"].to_dict()
        # JSON has no sets. Sorting makes the order deterministic.
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        return plain, get_peft_model_state_dict(whole)

    def fold(self) -> None:
        """Merge PEFT's adapters and restore the plain linear modules."""
        fold_peft(self._model)
        self._attached = {}

    def trained(self, part: str = "") -> list[nn.Parameter]:
        """Return the adapters' parameters whose names contain `part`; shared ones only once."""
        found = {p: None for adapter in self._attached.values() for p in adapter.named(part)}
        return list(found)

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return everything that PEFT trains, at the run's learning rate."""
        return [ParameterGroup(self.trained(), lr)]
