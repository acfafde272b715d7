"""Why PyTorch does not use an NVIDIA GPU that is in this machine, in one sentence with the next step."""

import os
from pathlib import Path

import torch

from dag.run.gpu import first_line
from dag.run.machine import driver

_PCI = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"
_DISPLAYS = ("0x0300", "0x0302")
_PAGE = "https://pytorch.org/get-started/locally"


def missing_gpu() -> str | None:
    """Why there is no CUDA device here although there could be one; None if there is one, or nothing to use it for.

    An NVIDIA GPU that CUDA_VISIBLE_DEVICES hides is not missed.
    """
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None
    version, build = driver(), torch.version.cuda
    if version is None:
        if _has_card():
            return (
                "there is an NVIDIA GPU without its driver: install NVIDIA's driver, until `nvidia-smi` lists the GPU"
            )
        return None
    if build is None:
        return (
            f"there is an NVIDIA GPU (driver {version}), and PyTorch {torch.__version__} is a build without CUDA: install one "
            f"with CUDA, see {_PAGE}"
        )
    reason = _why_not()
    if "too old" in reason:
        return (
            f"NVIDIA's driver {version} is too old for this PyTorch, which is built for CUDA {build}: update the driver, or "
            f"install a PyTorch for an older CUDA, see {_PAGE}"
        )
    return f"PyTorch cannot use the NVIDIA GPU ({reason}): look whether `nvidia-smi` lists it, and restart the machine"


def no_card() -> str | None:
    """A remark for a PyTorch with CUDA in a machine without an NVIDIA GPU; None otherwise."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return None
    return f"PyTorch is built for CUDA {torch.version.cuda}, and finds no NVIDIA GPU"


def unfit_gpu(device: torch.device) -> str | None:
    """Why this PyTorch has no code for a GPU that it sees; None if it has."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    # Code for a capability runs on later ones of the same major number, and PTX (compute_) on all later ones.
    known = [architecture.partition("_") for architecture in torch.cuda.get_arch_list()]
    built = [(kind, int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])) for kind, _, number in known if number]
    if torch.version.hip is not None or not built:
        return None
    for kind, of_major, of_minor in built:
        if (of_major, of_minor) <= (major, minor) and (kind == "compute" or of_major == major):
            return None
    age = "newer" if (major, minor) > max(built)[1:] else "older"
    names = ", ".join(torch.cuda.get_arch_list())
    return (
        f"this PyTorch has no code for {torch.cuda.get_device_name(device)} (sm_{major}{minor}; it has {names}): install a build "
        f"for {age} GPUs, see {_PAGE}"
    )


def _has_card() -> bool:
    """Whether Linux lists a display device of NVIDIA."""
    for device in _PCI.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith(_DISPLAYS):
            return True
    return False


def _why_not() -> str:
    """What PyTorch says when it is asked for CUDA."""
    try:
        torch.cuda.init()
    except Exception as error:
        return first_line(error)
    return "no device"
