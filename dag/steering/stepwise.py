"""A choice among several next states in each step, by the reward of the picture that each is expected to end in.

SVDD (Li et al. 2024) proposes M next states and takes one; the chosen one's prediction is the next step's. Free2Guide (Kim et al.
2025) does so in the first steps alone. DSearch (Li et al. 2025) has several such chains, drops the worst of them on the way, and
searches late steps, where previews are reliable, more often than early ones.

Legend: N beams, M proposals of each, T transitions.
"""

import math

import torch
from torch import Generator, Tensor

from dag.recipe.search_sections import SearchRecipe, Stepwise
from dag.steering.found import Found, Ids, window_of
from dag.steering.particles import Particles
from dag.steering.weights import drawn


def choose_stepwise(recipe: SearchRecipe, particles: Particles, ids_of: Ids, generator: Generator) -> Found:
    """SVDD, Free2Guide or DSearch for one picture; see `Search`."""
    section, T = recipe.search, particles.schedule.num_transitions
    assert isinstance(section, Stepwise)
    begin, end = window_of(recipe, section)
    x = particles.start(ids_of(section.beams))
    outputs = particles.outputs(x, 0)
    for k in range(T):
        N, M = len(x), _proposals(section, k, T, generator) if begin <= k < end else 1
        proposed = particles.step(x.repeat_interleave(M, 0), outputs.repeat_interleave(M, 0), k, ids_of(N * M))
        kept_beams = _beams_after(section.beams, k + 1, T)
        if k == T - 1:
            found = particles.finish(proposed)
            best = _best(found.reward.view(N, M), section.alpha, 1, generator)
            return Found(found.images[best[0]], float(found.reward[best[0]]), {"rewards": found.reward.tolist()})
        outputs = particles.outputs(proposed, k + 1)
        if M == 1 and kept_beams == N:
            x = proposed
            continue
        value = particles.look(proposed, outputs, k + 1).view(N, M)
        best = _best(value, section.alpha, kept_beams, generator)
        x, outputs = proposed[best], outputs[best]
    raise AssertionError("a chain has at least one step")


def _proposals(section: Stepwise, k: int, num_transitions: int, generator: Generator) -> int:
    """How many next states are proposed in step k."""
    if section.fewer is None:
        return section.proposals
    is_full = float(torch.rand((), generator=generator)) < 1 - math.exp(-3 * k / num_transitions)
    return section.proposals if is_full else section.fewer


def _beams_after(beams: int, steps: int, num_transitions: int) -> int:
    """How many of the beams are left after so many steps: their number falls exponentially, to one at the end."""
    return max(1, round(beams ** (1 - steps / num_transitions)))


def _best(value: Tensor, alpha: float, beams: int, generator: Generator) -> Tensor:
    """(beams,) int64 the chosen rows of N * M proposals: one of each beam by its value (N, M), then the best beams."""
    N, M = value.shape
    chosen = value.argmax(1) if alpha == 0 else torch.tensor([drawn(row / alpha, generator) for row in value])
    worth = value[torch.arange(N), chosen]
    left = worth.topk(beams).indices.sort().values
    return left * M + chosen[left]
