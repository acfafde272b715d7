"""`Kernels`, one implementation of all operations: what `choose` returns and `verify` compares with the reference."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from dag_kernels.reference import BalanceLoss, GroupNormed, SampledStep, TransitionLogProbs


@dataclass(frozen=True)
class Kernels:
    """One implementation of all operations; `dag_kernels.reference` documents their arguments."""

    name: str
    """"triton" or "torch"."""
    reason: str
    """Why this implementation was chosen, for run.json."""
    transition_log_probs: Callable[..., TransitionLogProbs]
    sampling_step: Callable[..., SampledStep]
    detailed_balance: Callable[..., BalanceLoss]
    group_norm: Callable[..., GroupNormed]


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels in Python on the CPU, as in tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
