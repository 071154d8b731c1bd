"""The files for the server of the GLUE benchmark (https://gluebenchmark.com): their names, columns and label texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wlora.config.schema import TaskConfig
from wlora.errors import ConfigError, wrong_value

# By task: file name and split. The diagnostic set AX has no training data; it is predicted by a model trained on MNLI.
_FILES = {
    "cola": [("CoLA", "test")],
    "sst2": [("SST-2", "test")],
    "mrpc": [("MRPC", "test")],
    "stsb": [("STS-B", "test")],
    "qqp": [("QQP", "test")],
    "mnli": [("MNLI-m", "test_matched"), ("MNLI-mm", "test_mismatched"), ("AX", "test")],
    "qnli": [("QNLI", "test")],
    "rte": [("RTE", "test")],
    "wnli": [("WNLI", "test")],
}
# For these files the server expects class names, for the others class numbers.
_IN_WORDS = ("MNLI-m", "MNLI-mm", "AX", "QNLI", "RTE")
_SMALLEST, _LARGEST = 0.0, 5.0  # scores of STS-B


def find_server_files(task: TaskConfig) -> Iterator[tuple[str, TaskConfig, str]]:
    """Yield the name of each file for a task, the task to load its rows with, and their split.

    On the hub, AX is a separate subset. In a local folder, it is a file `ax.*`.

    Raises:
        ConfigError: the server has no file for the task.
    """
    if task.name not in _FILES:
        raise wrong_value("split", "test", f"a run of {', '.join(_FILES)}, the tasks of the GLUE server")
    for name, split in _FILES[task.name]:
        if name != "AX":
            yield name, task, split
        elif task.path is not None:
            yield name, task, "ax"
        else:
            yield name, dataclasses.replace(task, subset="ax"), split


def write_server_file(file: Path, name: str, answers: Sequence[Any], labels: Sequence[str]) -> Path:
    """Write one file for the server: the columns `index` (from 0) and `prediction`, separated by a tab.

    Args:
        file: path of the file; its folder is created.
        name: name of the file on the server, which determines the format of predictions.
        answers: a class name, or for STS-B a value, per row of the test split.
        labels: the classes of the task in order.

    Raises:
        ConfigError: the file cannot be written.
    """
    numbers = {label: str(number) for number, label in enumerate(labels)}

    def spell(answer: Any) -> str:
        if not labels:
            return f"{min(max(float(answer), _SMALLEST), _LARGEST):.3f}"
        return str(answer) if name in _IN_WORDS else numbers[answer]

    lines = ["index\tprediction", *(f"{index}\t{spell(answer)}" for index, answer in enumerate(answers))]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"to={file.parent}: {file.name} cannot be written ({error.strerror})") from error
    return file
