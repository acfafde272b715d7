"""Operations on the transitions of a Gaussian denoising chain. Imports torch, never `dag`."""

from dag_kernels.reference import (
    gaussian_log_prob,
    guided,
    philox_4x32,
    standard_normal,
)

__all__ = ["gaussian_log_prob", "guided", "philox_4x32", "standard_normal"]
