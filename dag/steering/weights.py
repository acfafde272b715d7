"""Weights of particles, as logarithms. They are carried from state to state until a resampling spends them.

Legend: K particles.
"""

import math

import torch
from torch import Generator, Tensor


def log_mean_exp(log_weights: Tensor) -> float:
    """The logarithm of the mean weight of K particles."""
    return float(log_weights.double().logsumexp(0)) - math.log(len(log_weights))


def effective_size(log_weights: Tensor) -> float:
    """(sum w)^2 / sum w^2, between 1 and K."""
    return 1 / float(log_weights.double().softmax(0).square().sum())


def systematic(log_weights: Tensor, generator: Generator) -> Tensor:
    """(K,) int64 the particles that are kept, with repetition, on the CPU in ascending order.

    One uniform number places K equally spaced ticks on the cumulated weights. A particle of weight share w is kept floor(K w) or
    ceil(K w) times, K w on average: less noise than K independent draws.
    """
    K = len(log_weights)
    ends = log_weights.double().cpu().softmax(0).cumsum(0)
    ends[-1] = 1.0  # but for rounding
    ticks = (torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(K)) / K
    return torch.searchsorted(ends, ticks, right=True)


def drawn(log_weights: Tensor, generator: Generator) -> int:
    """One particle, drawn by its weight."""
    return int(torch.multinomial(log_weights.double().cpu().softmax(0), 1, generator=generator))
