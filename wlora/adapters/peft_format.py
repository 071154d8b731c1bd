"""Adapters in the folder format of the PEFT library: written by runs, and read by `adapter.path`.

    adapter_config.json   adapter_model.safetensors

Only safetensors are read. This module imports torch only when tensors are needed.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from fnmatch import translate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wlora.errors import ConfigError
from wlora.reading import open_file, read_json
from wlora.storage.atomic_write import MISSING
from wlora.storage.content_hash import hash_bytes, hash_file

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys in a record's `model` for the SHA-256 of the files. Older records have only the one of the weights.
RECORDED = {WEIGHTS: "adapter", CONFIG: "adapter_config"}
_PREFIX = "base_model.model."
_LARGEST_ALPHA = 1e9
_LARGEST_RANK, _MOST_PATTERNS = 1 << 16, 10_000
_BY_NAME = ("alpha_pattern", "rank_pattern")
_RANKS = ("r", "init_r", "target_r")
# Other keys by which PEFT selects modules. They are regular expressions, whose evaluation time is not bounded.
_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")
# Module names have at most a few hundred characters. File names do, too, and `_compile` treats the pattern as one.
_PATTERN = re.compile(r"\^?(\w|-|\.\*|\\?\.){1,300}")
_LARGEST_CONFIG = 1 << 20  # bytes
_TASK_TYPES = {
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "seq2seq": "SEQ_2_SEQ_LM",
}
# Other settings of PEFT's LoRA that change the function. Only these values are supported.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # other values change the base's weights
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "use_qalora"), (False,)),
    "fan_in_fan_out": (False, True),  # of the base weight: A and B are stored alike
    **dict.fromkeys(
        ("layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora", "arrow_config", "kasa_config"),
        (None,),
    ),
}


class Factors(NamedTuple):
    """A plain LoRA adapter: ΔW = scale · B A, with A of shape [r, d_in] and B of shape [d_out, r]."""

    A: Tensor
    B: Tensor
    scale: float


class Start(NamedTuple):
    """The content of a PEFT folder: adapters by module name, and the head's tensors by name."""

    adapters: dict[str, Factors]
    head: dict[str, Tensor]


def describe_lora(
    factors: Mapping[str, Factors], *, dropout: float, transposed: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's configuration and tensors of plain LoRA adapters.

    PEFT's alpha is scale·r, so that B is written unchanged. The most common pair of rank and alpha is written as `r`
    and `lora_alpha`, other values in `rank_pattern` and `alpha_pattern`.

    Args:
        factors: the adapters by module name.
        dropout: dropout probability on an adapter's input.
        transposed: whether the base weights are stored as [d_in, d_out], as GPT-2's are.
    """
    numbers = {name: (len(A), scale * len(A)) for name, (A, _, scale) in factors.items()}
    rank, alpha = Counter(numbers.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": sorted(factors),
        "rank_pattern": {name: r for name, (r, _) in numbers.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in numbers.items() if a != alpha},
    }
    if transposed:
        config["fan_in_fan_out"] = True
    tensors = {f"{_PREFIX}{name}.lora_{part}.weight": getattr(own, part) for name, own in factors.items() for part in "AB"}
    return config, tensors


def write_adapter(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], head: Mapping[str, nn.Module], *, kind: str | None
) -> dict[str, str]:
    """Write a PEFT folder.

    Args:
        folder: the new folder.
        config: PEFT's configuration of the adapters.
        tensors: the adapters' tensors.
        head: the modules of head and pooler by name; they become PEFT's `modules_to_save`.
        kind: the kind of head (`Task.head`); None for other kinds.

    Returns:
        The first 16 hex digits of the SHA-256 of both files, by their keys in a record.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save

    in_head = {f"{_PREFIX}{name}.{key}": p for name, module in head.items() for key, p in module.state_dict().items()}
    whole = {key: value.detach().cpu().float().clone() for key, value in sorted({**tensors, **in_head}.items())}
    content = save(whole, metadata={"format": "pt"})
    described = config | {
        "modules_to_save": sorted(head) or None,
        "task_type": _TASK_TYPES.get(kind or ""),
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    files = {WEIGHTS: content, CONFIG: (json.dumps(described, indent=2, sort_keys=True) + "\n").encode()}
    for name, text in files.items():
        (folder / name).write_bytes(text)
    return {RECORDED[name]: hash_bytes(text) for name, text in files.items()}


def make_uniform(folder: Path) -> None:
    """Rewrite a folder of plain LoRA adapters with one rank and alpha / rank = 1 for all of them; ΔW is the same.

    The scale is folded into B, and A and B are padded with zeros to the largest rank. Readers that know neither
    `rank_pattern` nor `alpha_pattern` can then load the folder. PEFT's other kinds of adapters stay as they are.

    Raises:
        ConfigError: the folder is damaged.
    """
    from safetensors.torch import save_file
    from torch.nn.functional import pad

    config = _load_config(folder, f"adapter {folder}")
    if any(_differs(config, key) for key in _PLAIN):
        return
    start = read_adapter(str(folder))
    rank = max(len(A) for A, _, _ in start.adapters.values())
    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in start.head.items()}
    for name, (A, B, scale) in start.adapters.items():
        missing = rank - len(A)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = pad(A, (0, 0, 0, missing))
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = pad(scale * B, (0, missing))
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, folder / WEIGHTS, metadata={"format": "pt"})
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fold_peft(model: nn.Module) -> None:
    """Merge PEFT's adapters into the model, and restore its linear modules and the trained modules of its head.

    PEFT's own `merge_and_unload` is not used: except for LoRA, it fails at a head module that is not linear, such as a
    pooler.

    Raises:
        ValueError: a merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save["default"])


def fingerprint(path: str) -> str:
    """Return 16 hex digits that identify the content of a folder's adapters, independent of its path.

    Raises:
        ConfigError: the folder does not exist, or its adapters are not plain LoRA.
    """
    config = _read_config(path)
    try:
        content = hash_file(Path(path) / WEIGHTS)
    except MISSING:
        pickled = "; adapter_model.bin is pickle and never read" if os.path.isfile(Path(path) / "adapter_model.bin") else ""
        raise ConfigError(f"adapter.path={path}: allowed is a folder with {CONFIG} and {WEIGHTS}{pickled}") from None
    except OSError as error:
        raise ConfigError(f"adapter.path={path}: {WEIGHTS} cannot be read ({error.strerror})") from None
    alphas = json.dumps([config.get("lora_alpha"), config.get("alpha_pattern")], sort_keys=True)
    return hash_bytes(f"{content}{alphas}".encode())


def identify_files(path: str) -> tuple[str, list[Path]]:
    """Return `fingerprint(path)` and the files that it covers."""
    return fingerprint(path), [Path(path) / CONFIG, Path(path) / WEIGHTS]


def read_adapter(path: str) -> Start:
    """Read the adapters and the head of a PEFT folder.

    Raises:
        ConfigError: a file is damaged, or holds tensors other than LoRA's A and B and those of `modules_to_save`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _read_config(path)
    try:
        tensors = load_file(Path(path) / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"adapter.path={path}: {WEIGHTS} cannot be read ({error})") from error
    head_modules = tuple(config["modules_to_save"])
    matrices: dict[str, dict[str, Tensor]] = {}
    head = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if found and tensor.dim() == 2:
            matrices.setdefault(found[1], {})[found[2]] = tensor
        elif any(f"{part}." in name for part in head_modules):
            head[name] = tensor
        else:
            raise ConfigError(f"adapter.path={path}: {key} is neither LoRA's A or B nor a tensor of a head")
    adapters = {}
    alphas = [(_compile(pattern), alpha) for pattern, alpha in config["alpha_pattern"].items()]
    for name, pair in matrices.items():
        if len(pair) < 2 or not len(pair["A"]) == pair["B"].shape[1] > 0:
            raise ConfigError(f"adapter.path={path}: A and B of {name} are incomplete, or their shapes do not match")
        alpha = next((a for pattern, a in alphas if pattern.match(name)), config["lora_alpha"])
        adapters[name] = Factors(pair["A"].float(), pair["B"].float(), alpha / len(pair["A"]))
    return Start(adapters, head)


def refuse_unbounded(content: bytes, where: str) -> None:
    """Check that PEFT can load the adapters in bounded time and memory. Works for all kinds of adapters.

    Args:
        content: content of `adapter_config.json`.
        where: name of the adapters for the error message.

    Raises:
        ConfigError: the configuration cannot be read, or a number or pattern in it is not bounded.
    """
    config = _parse_config(content, where)
    if config.get("target_modules") is not None and not _is_names(config["target_modules"]):
        fault: tuple[str, str] | None = ("target_modules", "a list of names")
    else:
        fault = next(((key, "null") for key in _CHOOSING if config.get(key)), None) or _find_unbounded(config)
        # PEFT evaluates patterns as regular expressions. Several `.*` in one pattern may backtrack without bound.
        fault = fault or next(
            ((key, "names of modules") for key in _BY_NAME if any("*" in name for name in config[key])), None
        )
    _refuse(fault, config, where)


def _read_config(path: str) -> dict[str, Any]:
    """Read a folder's configuration.

    Raises:
        ConfigError: the configuration cannot be read or is not plain LoRA.
    """
    config = _load_config(Path(path), f"adapter.path={path}")
    fault = next(((key, f"{values[0]}, PEFT's plain LoRA") for key, values in _PLAIN.items() if _differs(config, key)), None)
    _refuse(fault or _find_unbounded(config), config, f"adapter.path={path}")
    return config


def _load_config(folder: Path, where: str) -> dict[str, Any]:
    """Read a folder's configuration and fill in PEFT's defaults for missing keys."""
    try:
        with open_file(folder / CONFIG) as stream:
            content = stream.read(_LARGEST_CONFIG + 1)
    except MISSING:
        raise ConfigError(f"{where}: allowed is a folder with {CONFIG} and {WEIGHTS}") from None
    except OSError as error:
        raise ConfigError(f"{where}: {CONFIG} cannot be read ({error.strerror or error})") from None
    return _parse_config(content, where)


def _parse_config(content: bytes, where: str) -> dict[str, Any]:
    try:
        if len(content) > _LARGEST_CONFIG:
            raise ValueError(f"more than {_LARGEST_CONFIG >> 20} MiB")
        config: Any = read_json(content)
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise ConfigError(f"{where}: {CONFIG} cannot be read ({error})") from None
    config.setdefault("lora_alpha", 8)
    for key, empty in (("alpha_pattern", {}), ("rank_pattern", {}), ("modules_to_save", [])):
        config[key] = empty if config.get(key) is None else config[key]
    return config


def _refuse(fault: tuple[str, str] | None, config: dict[str, Any], where: str) -> None:
    if fault:
        key, allowed = fault
        raise ConfigError(f"{where}: {key} is {str(config[key])[:100]}: allowed is {allowed}")


def _differs(config: dict[str, Any], key: str) -> bool:
    return key in config and config[key] not in _PLAIN[key]


def _find_unbounded(config: dict[str, Any]) -> tuple[str, str] | None:
    """Return the first key whose numbers or patterns are not bounded, and what is allowed; None if there is none."""
    if not _is_alpha(config["lora_alpha"]):
        return "lora_alpha", f"a number above 0, at most {_LARGEST_ALPHA:g}"
    for key in _RANKS:
        if config.get(key) is not None and not _is_rank(config[key]):
            return key, f"1 to {_LARGEST_RANK}"
    patterns = {"alpha_pattern": (_is_alpha, "a number above 0")}
    if config.get("peft_type") != "ADALORA":  # its rank_pattern holds a mask per name
        patterns["rank_pattern"] = (_is_rank, f"1 to {_LARGEST_RANK}")
    for key, (holds, what) in patterns.items():
        if not (isinstance(config[key], dict) and all(map(holds, config[key].values()))):
            return key, f"{what} for each pattern"
    for key in _BY_NAME:
        names = config[key]
        if not isinstance(names, dict) or len(names) > _MOST_PATTERNS or not all(map(_PATTERN.fullmatch, names)):
            return key, "names of modules, or parts of them, with . for any character and .* for any characters"
    return None if _is_names(config["modules_to_save"]) else ("modules_to_save", "a list of names")


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST_ALPHA


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_RANK


def _compile(pattern: str) -> re.Pattern[str]:
    """Return an expression that matches the same module names as a PEFT pattern.

    The pattern matches the end of the name unless it starts with `^`.

    The pattern is translated as a file-name pattern, whose matching does not backtrack. A general regular expression
    could run without bound.
    """
    whole = pattern.removeprefix("^")
    glob = re.sub(r"\.\*|\\?\.", lambda found: {".*": "*", ".": "?", "\\.": "."}[found[0]], whole)
    return re.compile("|".join(map(translate, [glob] if whole != pattern else [glob, f"*.{glob}"])))
