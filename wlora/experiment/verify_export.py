"""Check of an exported folder: compare its logits with those of the recorded adapters, and check what vLLM supports."""

from __future__ import annotations

import importlib.util
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wlora.adapters.peft_format import CONFIG, fold_peft, read_adapter
from wlora.config.schema import Config, restore_config
from wlora.errors import ConfigError, RunFault, shorten
from wlora.experiment.export import find_record, read_options, require_base, trained_adapters, write_files
from wlora.reading import read_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPTIONS = {"results_dir": "results", "model.path": None, "offline": "false"}
# The maximum difference of logits, relative to the largest logit or to 1.
TOLERANCE = 1e-4
_TEXTS = ["The garden.", "Anna took the lamp to the garden, and Ben is in the kitchen.", "Where is it? Nobody knows."]
# The modules that vLLM supports in `modules_to_save` of a PEFT folder, and its default `max_lora_rank`.
_VLLM_HEADS, _VLLM_RANK = ("classifier", "score"), 16
_VLLM_WAY_OUT = "way out: serve the model of format=merged"


def verify(words: Sequence[str]) -> list[str]:
    """Compare the logits of an export with those of its run; return lines for the user.

    The logits of a few texts are computed in evaluation mode and float32 with four models: the base with the recorded
    adapters in this project's own layers; the folder loaded by PEFT; the merged model; and, if installed, the merged model
    in ONNX Runtime.

    Raises:
        ConfigError: the folder is not an export, or its run or base is missing.
        RunFault: logits differ by more than `TOLERANCE`.
    """
    names, options = read_options(words, OPTIONS)
    if len(names) != 1:
        raise ConfigError(f"{' '.join(names) or 'DIR is missing'}: allowed is one folder that wlora export wrote")
    folder = Path(names[0])
    results = str(options["results_dir"])
    record = find_record(results, read_run_id(folder))
    adapters = trained_adapters(results, record)
    config = restore_config(record.config)
    config.model.path, config.offline = options["model.path"] or config.model.path, options["offline"] == "true"
    source = require_base(config, record)
    import torch

    from wlora.models.loading import load_model, quiet
    from wlora.models.tokenizer import load_tokenizer
    from wlora.tasks.base import build_task

    task, tokenizer = build_task(config.task), load_tokenizer(config.model, source)

    def base() -> PreTrainedModel:
        return load_model(config.model, source, tokenizer, head=task.head, num_labels=task.num_labels, seed=0)

    inputs = _inputs(tokenizer, config, head=task.head)
    with quiet(), torch.no_grad():
        found = {"training": _logits(_as_trained(base(), adapters), inputs)}
        model = _load(folder, base(), found, inputs)
        found["merged"] = _logits(model, inputs)
        lines = []
        if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
            found["onnx"] = _onnx_logits(model, inputs)
        else:
            lines = ["onnx      not installed: pip install 'wlora[onnx]' compares ONNX Runtime, too"]
    return [*_compare(found), *lines, *_tell_vllm(folder)]


def read_run_id(folder: Path) -> str:
    """Return the run_id in the model card of an exported folder.

    Raises:
        ConfigError: there is no model card with a run_id.
    """
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    run = re.search(r"Run `([\w-]{1,100})` of wlora", text)
    if run is None:
        there = "has" if folder.is_dir() else "is no folder, so it has"
        raise ConfigError(
            f"{shorten(folder)}: {there} no model card that names a run: allowed is a folder that wlora export wrote"
        )
    return run[1]


def _as_trained(model: PreTrainedModel, adapters: Mapping[str, bytes]) -> PreTrainedModel:
    """Attach the recorded adapters as in training. Adapters that were trained by PEFT are attached by PEFT."""
    from peft import PeftModel

    from wlora.experiment.build import attach_adapters
    from wlora.methods.registry import build_method
    from wlora.models.heads import head_parameters

    with tempfile.TemporaryDirectory() as folder:
        write_files(adapters, Path(folder))
        try:
            start = read_adapter(folder)
        except ConfigError:  # not plain LoRA
            PeftModel.from_pretrained(model, folder)
            return model
    lora = build_method({"name": "lora", "rank": 1, "alpha": 1.0, "dropout": 0.0})
    attach_adapters(model, lora, ",".join(start.adapters), seed=0, start=start)
    for name, parameter in head_parameters(model).items():
        if name in start.head:
            parameter.data.copy_(start.head[name])
    return model


def _load(folder: Path, base: PreTrainedModel, found: dict[str, Tensor], inputs: dict[str, Tensor]) -> PreTrainedModel:
    """Load an export and return it as a plain model. The logits of PEFT's model are added to `found`."""
    from peft import PeftModel

    try:
        if not (folder / CONFIG).is_file():
            return type(base).from_pretrained(folder)
        PeftModel.from_pretrained(base, str(folder))  # it changes the base in place
        found["peft"] = _logits(base, inputs)
        fold_peft(base)
        return base
    except Exception as error:  # PEFT, transformers and safetensors raise many kinds of exceptions for invalid files
        raise ConfigError(f"{folder}: cannot be loaded ({type(error).__name__}: {shorten(error)})") from error


def _inputs(tokenizer: PreTrainedTokenizerBase, config: Config, *, head: str) -> dict[str, Tensor]:
    """Return a batch of texts of different lengths."""
    encoded = tokenizer(_TEXTS, padding=True, truncation=True, max_length=config.task.max_length, return_tensors="pt")
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    if head == "seq2seq":
        inputs["decoder_input_ids"] = encoded["input_ids"][:, :4]
    return inputs


def _outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    output: Any = model(**inputs)
    names = ("logits", "start_logits", "end_logits")
    return [output[name] for name in names if name in output]


def _logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return all logits as one vector."""
    import torch

    return torch.cat([part.float().flatten() for part in _outputs(model.eval(), inputs)])


def _onnx_logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of a plain model in ONNX Runtime on the CPU, as one vector."""
    import onnxruntime
    import torch

    # They warn of a missing torchvision, which no model of texts uses, and of products that they cannot fold.
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Tensor) -> list[Tensor]:
            return _outputs(self.model, dict(zip(inputs, values, strict=True)))

    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        given = tuple(inputs.values())
        torch.onnx.export(Plain().eval(), given, file, input_names=list(inputs), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        parts = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.cat([torch.from_numpy(part).float().flatten() for part in parts])


def _compare(found: dict[str, Tensor]) -> list[str]:
    """Return a line for each source of logits.

    Raises:
        RunFault: one of them differs from training.
    """
    expected = found.pop("training")
    largest = float(expected.abs().max())
    lines = [f"training  {expected.numel()} logits, the largest {largest:.4g}"]
    for name, logits in found.items():
        difference = float((logits - expected).abs().max())
        lines.append(f"{name:<9} differs by at most {difference:.1e}")
        if not difference <= TOLERANCE * max(1.0, largest):
            raise RunFault(
                "\n".join([*lines, f"more than {TOLERANCE:g} of the largest: the export differs from the trained model"])
            )
    return lines


def _tell_vllm(folder: Path) -> list[str]:
    """Return lines about settings of a PEFT folder that vLLM does not support, with a way out."""
    if not (folder / CONFIG).is_file():
        return ["vllm      supports the merged model like any other model"]
    config: Any = read_json((folder / CONFIG).read_bytes())
    others = [name for name in config.get("modules_to_save") or [] if name not in _VLLM_HEADS]
    lines = []
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        lines.append(f"does not support this kind of adapter, only plain LoRA\n{_VLLM_WAY_OUT}")
        return [f"vllm      {line}" for line in lines]
    if others:
        allowed = " and ".join(_VLLM_HEADS)
        lines.append(f"does not support modules_to_save={','.join(others)}, only {allowed}\n{_VLLM_WAY_OUT}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        lines.append("supports one rank and one alpha; the folder has several\nway out: export without compact=true")
    if config["r"] > _VLLM_RANK:
        lines.append(f"does not support rank {config['r']} by default\nway out: --max-lora-rank {config['r']} or more")
    return [f"vllm      {line}" for line in lines] or ["vllm      supports all settings of the adapter"]
