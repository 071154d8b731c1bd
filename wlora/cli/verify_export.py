"""Entry point: `wlora verify-export DIR`."""

from __future__ import annotations

from collections.abc import Sequence

from wlora.cli.entry import serve

USAGE = """\
usage: wlora verify-export DIR [results_dir=results] [model.path=DIR] [offline=true]

Compares the logits of an exported folder with those of the adapters in its run's record. The folder is tested as loaded by
PEFT, merged and, if onnx, onnxscript and onnxruntime are installed, in ONNX Runtime. Also prints which settings vLLM does
not support.

  DIR             a folder that wlora export wrote
  model.path      the base model, if it is not where the record says"""


def main(words: Sequence[str] | None = None) -> None:
    """Verify one export. Exit codes: 0 equal, 1 logits differ, 2 wrong request."""
    serve(_verify, USAGE, words)


def _verify(words: Sequence[str]) -> None:
    from wlora.experiment.verify_export import verify

    print("\n".join(verify(words)))
