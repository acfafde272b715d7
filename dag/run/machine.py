"""The machine on which numbers were computed: its device, threads, the versions of packages and drivers, and our commit."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from dag.run.gpu import GIB, this_device

_PACKAGES = (
    "dag-align",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "pillow",
    "safetensors",
    "triton",
    "bitsandbytes",
    "xformers",
)
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device's name, the number of threads, Python's version, and `versions`."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What measured figures depend on: machine, versions, commit."""
    machine = describe_machine(device)
    return {**machine.pop("versions"), **machine, "commit": git_commit()}


def tell_machine() -> None:
    """Print the GPU and the environment as one line of JSON, for `dag.checklist.runner`."""
    device = this_device()
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"
    print(json.dumps({"gpu": gpu, "cuda": torch.version.cuda, **environment(device)}))


def git_commit() -> str | None:
    """The commit of this code, with -dirty if files have changed since; None outside its git repository."""
    try:
        # An installed copy may lie in a folder of somebody else's repository.
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != Path(__file__).resolve().parents[2]:
            return None
        return _git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def versions() -> dict[str, str | None]:
    """Versions of the packages and of CUDA, cuDNN and NVIDIA's driver; None for what is not installed."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        **{name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "driver": driver() if torch.cuda.is_available() else None,
    }


def num_cores() -> int:
    """The number of CPU cores that this process may use, or, where the system does not say (not Linux), of all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of NVIDIA's driver; None without one. PyTorch only knows which CUDA version the driver supports."""
    try:
        first = _DRIVER_FILE.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:  # Windows and its subsystem for Linux have no such file
        first = ""
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", first)
    return found[1] if found else _driver_by_tool()


def _driver_by_tool() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
