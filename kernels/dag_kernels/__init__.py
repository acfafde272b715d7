"""Operations on the transitions of a Gaussian denoising chain, and in its network. Imports torch, never `dag`.

`choose` decides between fused Triton kernels and plain PyTorch; triton is imported only then.
"""

from dag_kernels.dispatch import CHOICES, PLAIN, choose
from dag_kernels.implementation import Kernels
from dag_kernels.reference import (
    BalanceLoss,
    GroupNormed,
    SampledStep,
    TransitionLogProbs,
    at_least_float32,
    combined,
    gaussian_log_prob,
    guided,
    penalty,
    philox_4x32,
    residual,
    standard_normal,
    with_rewarded_end,
)

__all__ = [
    "CHOICES",
    "PLAIN",
    "BalanceLoss",
    "GroupNormed",
    "Kernels",
    "SampledStep",
    "TransitionLogProbs",
    "at_least_float32",
    "choose",
    "combined",
    "gaussian_log_prob",
    "guided",
    "penalty",
    "philox_4x32",
    "residual",
    "standard_normal",
    "with_rewarded_end",
]
