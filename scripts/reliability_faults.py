"""Let single file operations of runs fail: the part `faults` of `scripts/reliability.py`.

A shim replaces Python's file functions. It counts their calls on files of the results, the data, the model and the adapters,
and lets one of these calls fail. It does not see file operations of native code: safetensors reads and writes the weights of
models, tokenizers reads `tokenizer.json`, and pyarrow reads data files.
"""

from __future__ import annotations

import builtins
import errno
import functools
import gc
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from reliability_kill import only_record

from wlora.config.schema import config_folder, register_schema
from wlora.console import protect_output
from wlora.storage.records import Record, RecordStore

ERRORS = (errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EMFILE)
STEPS = 8
SETTING = [
    *("task=story_nli", "model=tiny_bert", "task.batch_size=4", f"train.max_steps={STEPS}", "train.eval_every=4"),
    *("train.checkpoint_every=2", "rank=4", "lr=1e-3", "offline=true", "method=wlora", "method.select_steps=4"),
    "train.save_model=true",
]
COMPARED = ("status", "metrics", "adapters", "events", "parameters", "steps", "curve", "predictions", "model", "error")
GOOD = ("went on", "stopped in a line")
# The time after which `wlora.storage.content_hash` trusts the timestamps of a file, plus a margin.
UNTIL_OLD = 3.0
SECONDS = 300
"""A run that takes longer than this counts as hanging."""

# Functions whose first argument is a path, and those whose first argument is a descriptor.
_READ = ("open", "stat", "lstat", "listdir", "scandir")
_BY_PATH = (*_READ, "mkdir", "rename", "replace", "link", "unlink", "remove", "rmdir", "utime")
_BY_DESCRIPTOR = ["fsync", "read", "write", "fstat", "ftruncate"]


class Shim:
    """Counts the calls on files in some folders, and lets one of them fail.

    Attributes:
        calls: all calls so far, each with the kind of file (`replace results/records/json`) and the call stack.
    """

    def __init__(self, roots: dict[str, Path], fail_at: int | None, number: int, on_fault: Callable[[str], None]) -> None:
        self.roots = {f"{folder}": name for name, folder in roots.items()}
        self.fail_at, self.number, self.on_fault = fail_at, number, on_fault
        self.calls: list[tuple[str, str]] = []
        self._readlink = os.readlink

    def meet(self, call: str, path: Any, dir_fd: int | None = None) -> None:
        """Record a call of the main thread; raise OSError if this call must fail.

        Calls of the lock's heartbeat thread are not counted: their number depends on time, so the numbers of calls would not
        be reproducible.
        """
        place = self.place(path, dir_fd)
        if place is None or threading.current_thread() is not threading.main_thread():
            return
        self.calls.append((f"{call} {place}", _lines_that_led_here() if self.fail_at is None else ""))
        if len(self.calls) - 1 == self.fail_at:
            self.on_fault(self.calls[-1][0])
            named = () if isinstance(path, int) else (str(path),)
            raise OSError(self.number, os.strerror(self.number), *named)

    def place(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return the watched folder and the kind of file; None for files elsewhere."""
        try:
            if isinstance(path, int):
                text = self._readlink(f"/proc/self/fd/{path}")
            else:
                text = os.fsdecode(os.fspath(path))
                if not text.startswith("/"):
                    text = f"{self._readlink(f'/proc/self/fd/{dir_fd}') if dir_fd is not None else os.getcwd()}/{text}"
        except (OSError, TypeError):
            return None
        for root, name in self.roots.items():
            if text == root or text.startswith(f"{root}/"):
                parts = text[len(root) :].strip("/").split("/")
                # The name of a temporary file is that of its target with a unique number appended.
                kinds = [kind for kind in parts[-1].lstrip(".").split(".")[1:] if kind.isalpha()]
                return "/".join([name, *parts[:-1][:1], *(kinds[:1] or parts if len(parts) == 1 else kinds[:1])]).strip("/")
        return None

    def install(self) -> None:
        """Replace Python's functions by the shim permanently."""
        for name in (*_BY_PATH, *_BY_DESCRIPTOR):
            setattr(os, name, self._wrap(name, getattr(os, name)))
        builtins.open = io.open = self._opener(io.open)  # type: ignore[assignment]

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *given: Any, **named: Any) -> Any:
            self.meet(name, path, named.get("dir_fd"))
            return original(path, *given, **named)

        return call

    def _opener(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a replacement of `open` whose files in the watched folders report each read and write."""
        shim = self

        class Watched(io.FileIO):
            def readinto(self, buffer: Any) -> int | None:
                shim.meet("read", self.name)
                return super().readinto(buffer)

            def readall(self) -> bytes:
                shim.meet("read", self.name)
                return super().readall()

            def write(self, content: Any) -> int:
                shim.meet("write", self.name)
                return super().write(content)

        def opened(file: Any, mode: str = "r", buffering: int = -1, *given: Any, **named: Any) -> Any:
            named |= dict(zip(("encoding", "errors", "newline", "closefd", "opener"), given, strict=False))
            if self.place(file) is None:
                return original(file, mode, buffering, **named)
            self.meet("open", file)
            own = {name: named.pop(name) for name in ("closefd", "opener") if name in named}
            raw = Watched(file, "".join(sign for sign in mode if sign in "rwax+"), **own)
            if buffering == 0:
                return raw
            kind: Any = io.BufferedReader if mode[0] == "r" else io.BufferedWriter
            buffer = (io.BufferedRandom if "+" in mode else kind)(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, **named)

        return opened


def _lines_that_led_here() -> str:
    """Return the lines of the package in the call stack, innermost first."""
    found, frame = [], sys._getframe(2)
    while frame.f_back is not None:
        if "/wlora/" in frame.f_code.co_filename:
            found.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


@dataclass(frozen=True)
class Ended:
    """The end of a run in a separate process: its exit code (None if it hung) and its output."""

    code: int | None
    output: str

    def in_order(self) -> bool:
        """Tell whether the run succeeded or ended with an error of one or two lines."""
        error = self.output.partition("error: ")[2].splitlines()
        told = self.code == 0 or (self.code in (1, 2) and 1 <= len(error) <= 2)
        return told and "Traceback" not in self.output


class Bench:
    """The files of the trials, and functions that start runs with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.roots = {name: folder / name for name in ("results", "data", "model", "start")}
        self.words = [*SETTING, f"results_dir={folder / 'results'}", f"task.path={folder / 'data'}"]
        self.words += [f"model.path={folder / 'model'}", f"adapter.path={folder / 'start'}"]

    @property
    def results(self) -> Path:
        """The results folder, which is created again for each trial."""
        return self.roots["results"]

    def prepare(self) -> None:
        """Write the data. Create a model and initial adapters by runs without a shim."""
        from wlora.data.synthetic.story import generate

        self.roots["data"].mkdir()
        for split, count in (("train", 32), ("validation", 12)):
            columns = generate("story_nli", split)
            rows = [columns, *list(zip(*columns.values(), strict=True))[:count]]
            text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
            (self.roots["data"] / f"{split}.tsv").write_text(text)
        ended = self.run([*SETTING, f"task.path={self.folder / 'data'}", f"results_dir={self.folder / 'made'}"])
        assert ended.code == 0, ended.output
        for part, name in (("models", "model"), ("adapters", "start")):
            (made,) = (self.folder / "made" / part).iterdir()
            shutil.move(made, self.roots[name])

    def run(self, words: list[str], arm: Callable[[], Shim] | None = None, calls: Path | None = None) -> Ended:
        """Run the entry point in a forked process, with or without a shim.

        Args:
            calls: file to which the shim's calls are written.
        """
        output = self.folder / "output"
        _compose(tuple(words))
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                signal.alarm(SECONDS)
                descriptor = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                code = _be_run(words, arm, calls)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return Ended(None if code == -signal.SIGALRM else code, output.read_text(errors="replace"))

    def record(self) -> Record | None:
        """Return the only record of the results folder; None if there is no readable one."""
        return only_record(self.results)

    def newest(self) -> int:
        """Return the step of the newest checkpoint; 0 if there is none."""
        return max((int(path.name.removeprefix("step-")) for path in self.results.glob("checkpoints/**/step-*")), default=0)


def _be_run(words: list[str], arm: Callable[[], Shim] | None, calls: Path | None) -> int:
    """Execute `python -m wlora.run` in a forked process, after composing the configuration; return its exit code."""
    from wlora.cli import job as jobs

    composed = _compose(tuple(words)).copy()
    shim = arm() if arm else None
    if shim is not None:
        shim.install()
    protect_output()
    code = jobs.attempt("", lambda: jobs._run_composed("", composed, words, in_sweep=False)).exit_code
    sys.stdout.flush()
    if calls is not None and shim is not None:
        shim.fail_at = None
        calls.write_text(json.dumps(shim.calls))
    return code


@functools.cache
def _compose(words: tuple[str, ...]) -> DictConfig:
    """Compose a configuration like the command line. Hydra reads no file of the results, the data or the model."""
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        composed: DictConfig = compose("config", overrides=list(words))
        return composed


def _die_at_six() -> Shim:
    """Make the run exit without output after its sixth step, whose checkpoint is the third."""
    from wlora.training.interruption import Guard

    before = Guard.__call__

    def stop(self: Guard, trainer: Any) -> None:
        before(self, trainer)
        if trainer.step == 6:
            os._exit(0)

    Guard.__call__ = stop  # type: ignore[method-assign]
    return Shim({}, None, 0, print)


def faults(minutes: float) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """Let one call fail in each trial, for as many calls as the time allows."""
    import wlora.experiment.run
    import wlora.experiment.shared_inputs  # noqa: F401  # torch and transformers, before the processes fork

    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name).resolve())
        bench.prepare()
        bench.run(bench.words, _die_at_six)
        assert bench.newest() == 6
        shutil.move(bench.results, bench.folder / "interrupted")
        assert (first := bench.run(bench.words)).code == 0, first.output
        shutil.copytree(bench.results, bench.folder / "whole")
        expected = bench.record()
        assert expected is not None
        gc.freeze()  # avoids copies of memory pages in forked processes
        time.sleep(UNTIL_OLD)  # recently written files are hashed on every access, which would change the calls
        starts = {"fresh": None, "resumed": bench.folder / "interrupted", "done": bench.folder / "whole"}
        sites = [(what, start, *site) for what, start in starts.items() for site in _count(bench, start)]
        for index in _in_order(sites):
            if time.monotonic() - began > 60 * minutes:
                break
            what, start, at, call, lines = sites[index]
            row = {"found": what, "call": call, "number": at, **_try(bench, start, at, ERRORS[index % 4], expected)}
            rows.append({**row, "lines": lines})
            if row["outcome"] not in GOOD:
                print(row, flush=True)
    rows.sort(key=lambda row: (row["found"], row["number"]))
    counts = Counter(row["outcome"] for row in rows)
    summary = {
        "calls_in_all": len(sites),
        "different_calls": len({site[3:] for site in sites}),
        "calls_answered_with_a_fault": len(rows),
        "different_calls_answered": len({(row["call"], row["lines"]) for row in rows}),
        "outcomes": dict(counts),
        "errors": dict(Counter(row["error"] for row in rows)),
        "calls": dict(Counter(row["call"].partition(" ")[0] for row in rows)),
        "files": dict(Counter(row["call"].partition(" ")[2].partition("/")[0] for row in rows)),
        "found_by_the_run": dict(Counter(row["found"] for row in rows)),
        "not_seen_by_the_shim": "native files of safetensors, tokenizers and pyarrow; mmap; the heartbeat of the lock",
    }
    return rows, summary, len(rows) > 0 and counts.keys() <= set(GOOD)


def _in_order(sites: list[tuple[str, Path | None, int, str, str]]) -> list[int]:
    """Return the order in which calls fail: first one call of each kind from each line, then the others.

    Both parts are ordered so that every initial segment is spread evenly over the part, because the time may not suffice for
    all calls.
    """
    golden = (5**0.5 - 1) / 2
    seen, first, others = set[tuple[str, str]](), list[int](), list[int]()
    for index, (_, _, _, call, lines) in enumerate(sites):
        (others if (call, lines) in seen else first).append(index)
        seen.add((call, lines))
    return [part[at] for part in (first, others) for at in sorted(range(len(part)), key=lambda at: at * golden % 1)]


def _count(bench: Bench, start: Path | None) -> list[tuple[int, str, str]]:
    """Return the calls of an undisturbed run, each with its number and its call stack."""
    _lay_out(bench, start)
    calls = bench.folder / "calls"
    ended = bench.run(bench.words, lambda: Shim(bench.roots, None, 0, print), calls)
    assert ended.code == 0, ended.output
    return [(number, call, lines) for number, (call, lines) in enumerate(json.loads(calls.read_text()))]


def _lay_out(bench: Bench, start: Path | None) -> None:
    shutil.rmtree(bench.results, ignore_errors=True)
    if start is not None:
        shutil.copytree(start, bench.results)


def _try(bench: Bench, start: Path | None, at: int, number: int, expected: Record) -> dict[str, Any]:
    """Let a call fail. If results are missing afterwards, repeat the command. Return the outcomes."""
    _lay_out(bench, start)
    noted = bench.folder / "noted"
    noted.write_text("")

    def note(call: str) -> None:
        noted.write_text(f"{bench.newest()} {call}")

    first = bench.run(bench.words, lambda: Shim(bench.roots, at, number, note))
    newest, _, hit = noted.read_text().partition(" ")
    between = bench.record()
    whole = first.code == 0 and between is not None and _same(bench, expected, between)
    again = Ended(0, "") if whole else bench.run(bench.words)
    record = bench.record()
    if first.code is None or again.code is None:
        outcome = "hung"
    elif not (first.in_order() and again.in_order()):
        outcome = "traceback"
    elif again.code != 0 or record is None or not _same(bench, expected, record):
        outcome = "different"
    elif not hit:
        outcome = "no fault"
    elif first.code and not (between and between.status == "success") and max([0, *record.resumed_at]) < int(newest):
        outcome = "lost"
    else:
        outcome = "went on" if first.code == 0 else "stopped in a line"
    told = next((line for line in first.output.splitlines() if "error: " in line or "cannot" in line), "")
    if outcome not in GOOD:
        told = f"{first.output}\n--- again:\n{again.output}"[-3000:]
    told = told.replace(str(bench.folder), "")
    return {"error": errno.errorcode[number], "exit": first.code, "outcome": outcome, "told": told}


def _same(bench: Bench, expected: Record, record: Record) -> bool:
    """Tell whether a record, the files that it refers to, and the saved model equal those of an undisturbed run."""
    if any(getattr(expected, key) != getattr(record, key) for key in COMPARED):
        return False
    weights = [next(results.glob("models/*/model.safetensors"), None) for results in (bench.folder / "whole", bench.results)]
    store = RecordStore(bench.results)
    store.read_curve(record)
    read = None not in weights and store.read_predictions(record) is not None
    return read and len({file.read_bytes() for file in weights if file}) == 1
