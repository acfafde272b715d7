"""What is stored of a rollout, and how the rest is recomputed from it.

A trajectory keeps its chain of states, a seed and a few scalars per step. The noise follows from the seed, and
the network's output at sampling time from two states and the noise, so neither is stored. The state *is* the
rounded stored value: log-probs are evaluated there and the next UNet call sees it.

Legend: N trajectories, T transitions.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from dag_kernels import standard_normal
from torch import Tensor

from dag.schedule import Schedule


@dataclass(frozen=True)
class Trajectories:
    """N chains of one rollout. Log-probs are sums over latent dims, float32."""

    chain: Tensor
    """(T + 1, N, C, H, W) in the stored dtype, noisiest first."""
    log_pf: Tensor
    """(N, T) at sampling time."""
    log_pb: Tensor
    """(N, T)"""
    looking: Tensor | None
    """(N, T) raw reward of x0_hat at each state, or None if nothing was scored."""
    reward: Tensor
    """(N,) raw reward of the final image."""
    prompt_id: Tensor
    """(N,) int64 on the CPU."""
    sample_id: Tensor
    """(N,) int64, global over epochs: with the seed and k it determines all noise."""
    seed: int
    noise_dtype: torch.dtype = torch.float32

    @property
    def num_trajectories(self) -> int:
        return len(self.sample_id)

    def noise(self, rows: Tensor, k: int) -> Tensor:
        """(B, C, H, W) float32: the noise that led from state k to k + 1."""
        return draw_noise(self.seed, self.sample_id[rows], k, tuple(self.chain.shape[2:]), self.noise_dtype)

    def output_old(self, schedule: Schedule, rows: Tensor, k: int) -> Tensor:
        """(B, C, H, W) float32: the guided network output at sampling time, up to the rounding of the chain."""
        return schedule.output_of(self.chain[k, rows], self.chain[k + 1, rows], self.noise(rows, k), k)


def draw_noise(seed: int, sample_id: Tensor, k: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Counter-based noise, rounded to `dtype` (the published code draws it in bfloat16), as float32."""
    return standard_normal(seed, sample_id, k, shape).to(dtype).float()


def concatenate(parts: list[Trajectories]) -> Trajectories:
    """One batch of several rolled-out tiles."""
    first = parts[0]
    joined: dict[str, Any] = {
        field.name: torch.cat([getattr(part, field.name) for part in parts], dim=1 if field.name == "chain" else 0)
        for field in fields(Trajectories)
        if isinstance(getattr(first, field.name), Tensor)
    }
    return Trajectories(**{"looking": None, **joined}, seed=first.seed, noise_dtype=first.noise_dtype)
