"""Trajectories of given pictures: their latents are noised step by step by P_B, from the clean end to the noisy one.

Any trajectory has probability under P_F, so that objectives whose balance holds on every trajectory can be trained on these. They
are typical ones for eta 1 alone: with less noise P_F seldom takes such steps (for eta 0.5 they lie 2.1 to 2.6 of its standard
deviations from its mean), and gradients are noisier.

Legend: B pictures, T transitions.
"""

import torch
from torch import Tensor

from dag.chain.rollout import CHAIN_DTYPES
from dag.chain.schedule import INITIAL_NOISE, Schedule
from dag.chain.trajectory import draw_noise
from dag.recipe import Sampler


@torch.no_grad()
def noised_chain(
    schedule: Schedule, x_0: Tensor, sample_id: Tensor, seed: int, sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """(chain (T + 1, B, C, H, W), noisiest first, log P_B (B, T) as sums over latent dims) of clean latents.

    The last state has the noise level at which the schedule ends. States are rounded before the next noise is added, so
    log P_B is that of the stored ones.

    Args:
        x_0:       (B, C, H, W) float32.
        sample_id: (B,) int64 on the policy's device; with the seed it determines the noise.
    """
    x = last_state(schedule, x_0, sample_id, seed, sampler)[0]
    states, log_pb = [x], []
    for k in reversed(range(schedule.num_transitions)):
        noise = draw_noise(seed, sample_id, k, tuple(x_0.shape[1:]), torch.float32)
        x_t = schedule.noised_back(x, noise, k).to(x.dtype)
        log_pb.append(schedule.log_pb(x_t, x, k))
        states.append(x_t)
        x = x_t
    return torch.stack(states[::-1]), torch.stack(log_pb[::-1], dim=1)


@torch.no_grad()
def last_state(schedule: Schedule, x_0: Tensor, sample_id: Tensor, seed: int, sampler: Sampler) -> Tensor:
    """(1, B, C, H, W) the last state of `noised_chain` alone, for objectives that need no more."""
    noise = draw_noise(seed, sample_id, INITIAL_NOISE, tuple(x_0.shape[1:]), torch.float32)
    end = schedule.signal_next[-1] * x_0 + schedule.noise_next[-1] * noise
    return end.to(CHAIN_DTYPES[sampler.chain_dtype])[None]
