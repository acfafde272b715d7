"""ReNO (Eyring et al. 2024) for many steps: gradient ascent on the first noise, with the noise of the steps held fixed.

    maximise  r(x_0(z)) - penalty (|z|^2 / 2 - (D - 1) log |z|)

The second term is minus the log-density of the norm of D standard normal numbers, up to a constant: it holds |z| near sqrt(D - 1),
where the denoiser has seen its noise. The gradient of the first goes backwards along the chain, one step and one graph of the
denoiser at a time (`dag.training.ascent` explains the sweep). The best picture on the way is kept.

Legend: D elements of a latent, T transitions.
"""

import torch
from torch import Generator, Tensor

from dag.chain.jacobian import backwards
from dag.chain.rollout import last_latents
from dag.recipe.search_sections import NoiseOptimisation, SearchRecipe
from dag.steering.found import Found, Ids
from dag.steering.particles import Ends, Particles

# Guided forward passes that a backward pass costs.
_BACKWARD = 1.2


def optimise_noise(recipe: SearchRecipe, particles: Particles, ids_of: Ids, generator: Generator) -> Found:
    """ReNO for one picture; see `Search`."""
    section, ids = recipe.search, ids_of(1)
    assert isinstance(section, NoiseOptimisation)
    z = particles.start(ids).float()
    z.requires_grad_(True)
    optimizer = torch.optim.SGD([z], section.rate, momentum=0.9, nesterov=True)
    best: Ends | None = None
    rewards = []
    for iteration in range(section.iterations):
        chain = list(particles.walk(z.detach(), ids))
        ends = particles.finish(chain[-1])
        rewards.append(float(ends.reward))
        if best is None or rewards[-1] > float(best.reward):
            best = ends
        if iteration < section.iterations - 1:
            z.grad = section.penalty * _norm_gradient(z.detach()) - _reward_gradient(particles, chain)
            torch.nn.utils.clip_grad_norm_([z], section.clip_norm)
            optimizer.step()
    assert best is not None
    return Found(best.images[0], float(best.reward), {"rewards": rewards})


def _norm_gradient(z: Tensor) -> Tensor:
    """The gradient of |z|^2 / 2 - (D - 1) log |z|, which vanishes where |z|^2 = D - 1."""
    return z - (z.numel() - 1) * z / z.double().square().sum().float()


def _reward_gradient(particles: Particles, chain: list[Tensor]) -> Tensor:
    """(1, C, H, W) float32 d r(x_0) / d z along the chain, with the noise of its steps held fixed."""
    policy, schedule, text = particles.policy, particles.schedule, particles.text_of(chain[0])
    x = chain[-1].detach().float().requires_grad_(True)
    with torch.enable_grad():
        clean = last_latents(policy, x, text)
    _, adjoint = particles.reward.gradient(clean.detach(), [particles.prompt], policy.decode, 1)
    if clean is not x:
        adjoint = backwards(clean, x, adjoint)
    for k in reversed(range(schedule.num_transitions)):
        x = chain[k].detach().float().requires_grad_(True)
        with torch.enable_grad():
            output = policy.predict(x, schedule.timesteps[k].expand(1), text).guided
        particles.work.passes += 1 + _BACKWARD
        adjoint = schedule.mean_x[k] * adjoint + backwards(output, x, schedule.mean_output[k] * adjoint)
    return adjoint
