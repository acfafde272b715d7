"""All operations in one implementation: what a run is handed, and what `verify` holds to the reference."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from dag_kernels.reference import BalanceLoss, SampledStep, TransitionLogProbs


@dataclass(frozen=True)
class Kernels:
    """The operations in one form; `dag_kernels.reference` documents their arguments."""

    name: str
    """"triton" or "torch"."""
    reason: str
    """Why, for the run's record."""
    transition_log_probs: Callable[..., TransitionLogProbs]
    sampling_step: Callable[..., SampledStep]
    detailed_balance: Callable[..., BalanceLoss]


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
