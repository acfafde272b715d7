"""Decides which implementation of the operations a run uses: fused Triton kernels or plain PyTorch."""

import functools
from typing import Any

import torch

from dag_kernels import reference
from dag_kernels.implementation import Kernels, is_interpreted

CHOICES = ("auto", "triton", "torch")
# Characters of an error message; a compiler's can be very long.
_LONGEST_REASON = 200


def choose(kernels: str, device: torch.device) -> Kernels:
    """The operations for a device.

    Args:
        kernels: "auto" takes Triton if it runs on this device, else PyTorch; "triton" and "torch" take that one.
        device:  where the operations will run. On the meta device Triton's kernels count as launches and compute nothing.

    Raises:
        ValueError: Triton is asked for where it cannot run, or the choice is unknown.
    """
    if kernels not in CHOICES:
        raise ValueError(f"kernels={kernels!r}: use {', '.join(CHOICES)}")
    if kernels == "torch":
        return _torch("asked for")
    obstacle = _obstacle(device, may_interpret=kernels == "triton")
    if obstacle is None:
        return _triton("asked for" if kernels == "triton" else f"auto on {device.type}")
    if kernels == "triton":
        raise ValueError(f"kernels=triton: {obstacle}")
    return _torch(f"auto: {obstacle}")


def _obstacle(device: torch.device, may_interpret: bool) -> str | None:
    """Why Triton cannot run on this device; None if it can."""
    if device.type not in ("cuda", "meta") and not (may_interpret and is_interpreted()):
        return f"Triton needs a GPU, the run is on {device.type}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None if device.type == "meta" else _failure_of_a_trial(device)


@functools.cache
def _failure_of_a_trial(device: torch.device) -> str | None:
    """Launch every kernel once on a few numbers; returns what went wrong, or None.

    That triton can be imported proves little: where a C compiler or Python.h is missing, it raises at the first launch.
    """
    from dag_kernels.verify import launch_every_operation

    try:
        launch_every_operation(_triton("a trial"), device)
    except Exception as error:  # whatever a compiler, a driver or a missing file may raise
        first = (str(error).strip() or "no message").partition("\n")[0]
        return f"a trial launch raised {type(error).__name__}: {first[:_LONGEST_REASON]}"
    return None


def _torch(reason: str) -> Kernels:
    return _kernels("torch", reason, reference, reference, reference, reference)


def _triton(reason: str) -> Kernels:
    from dag_kernels import balance, group_norm, sampling, transition

    return _kernels("triton", reason, transition, sampling, balance, group_norm)


def _kernels(name: str, reason: str, transition: Any, sampling: Any, balance: Any, norm: Any) -> Kernels:
    """The implementation whose operations these modules have."""
    return Kernels(
        name, reason, transition.transition_log_probs, sampling.sampling_step, balance.detailed_balance, norm.group_norm
    )


PLAIN = _torch("the default")
