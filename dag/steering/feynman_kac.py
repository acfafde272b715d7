"""Best of n, and Feynman-Kac steering (Singhal et al. 2025): particles that are weighted and resampled on their way.

At a scored state x_k, with r_k = r(x0_hat(x_k)), the log-weight of a particle gains

    difference   lambda (r_k - r_before)
    max          lambda (max(r_k, ...) - max(r_before, ...))
    sum          lambda r_k

and at the end lambda r(x_0) minus all that it has gained so far: whatever the potential, its product over a chain is exp(lambda
r(x_0)), so that the weighted particles have the law p exp(lambda r), and the product of the mean weights is an unbiased estimate
of Z = E_p[exp(lambda r(x_0))]. A resampling copies particles in proportion to their weights, which are then equal. Where none takes
place the weights are carried on; forgetting them would lose the reward that they stand for.

Best of n is the search without weights: n chains, of which the best is kept.

Legend: K particles, T transitions.
"""

import torch
from torch import Generator, Tensor

from dag.recipe.search_sections import BestOfN, SearchRecipe, Steering
from dag.steering.found import Found, Ids, window_of
from dag.steering.particles import Ends, Particles
from dag.steering.weights import drawn, effective_size, log_mean_exp, systematic


class Weighing:
    """The log-weights of K particles, and the estimate of log Z.

    Attributes:
        log_weights: (K,) float64 since the last resampling.
        log_z:       the logarithm of the product of the mean weights of all resamplings.
    """

    def __init__(self, section: Steering) -> None:
        self.section = section
        K = section.particles
        self.log_weights, self.log_z, self.resamplings = torch.zeros(K, dtype=torch.float64), 0.0, 0
        self._last = torch.zeros(K, dtype=torch.float64)
        self._gained = torch.zeros(K, dtype=torch.float64)
        self._has_looked = False

    def see(self, reward: Tensor) -> None:
        """Weigh the particles by the rewards (K,) of their x0_hat."""
        reward = reward.double()
        if self.section.potential == "sum":
            gain = reward
        elif self.section.potential == "max" and self._has_looked:
            reward = torch.maximum(reward, self._last)
            gain = reward - self._last
        else:
            gain = reward - self._last
        self._last, self._has_looked = reward, True
        self._gain(self.section.strength * gain)

    def end(self, reward: Tensor) -> None:
        """Weigh the particles by the rewards (K,) of their pictures, which corrects what they have gained on the way."""
        self._gain(self.section.strength * reward.double() - self._gained)

    def resampled(self, generator: Generator) -> Tensor | None:
        """(K,) the particles that go on, or None if the weights are carried on instead."""
        is_even = effective_size(self.log_weights) >= 0.5 * len(self.log_weights)
        if self.section.resample == "adaptive" and is_even:
            return None
        kept = systematic(self.log_weights, generator)
        self.log_z += log_mean_exp(self.log_weights)
        self.log_weights = torch.zeros_like(self.log_weights)
        self._last, self._gained = self._last[kept], self._gained[kept]
        self.resamplings += 1
        return kept

    def _gain(self, gain: Tensor) -> None:
        self._gained = self._gained + gain
        self.log_weights = self.log_weights + gain


def steer(recipe: SearchRecipe, particles: Particles, ids_of: Ids, generator: Generator) -> Found:
    """Feynman-Kac steering for one picture; see `Search`."""
    section = recipe.search
    assert isinstance(section, Steering)
    begin, end = window_of(recipe, section)
    ids, weighing = ids_of(section.particles), Weighing(section)
    x = particles.start(ids)
    for k in range(particles.schedule.num_transitions):
        outputs = particles.outputs(x, k)
        if begin <= k < end and (k - begin) % section.every == 0:
            weighing.see(particles.look(x, outputs, k))
            kept = weighing.resampled(generator)
            if kept is not None:
                x, outputs = x[kept], outputs[kept]
        x = particles.step(x, outputs, k, ids)
    ends = particles.finish(x)
    weighing.end(ends.reward)
    number = int(ends.reward.argmax()) if section.choose == "best" else drawn(weighing.log_weights, generator)
    details = {
        "log_z": weighing.log_z + log_mean_exp(weighing.log_weights),
        "resamplings": weighing.resamplings,
        "effective_size": effective_size(weighing.log_weights),
    }
    return _kept(ends, number, details)


def best_of_n(recipe: SearchRecipe, particles: Particles, ids_of: Ids, generator: Generator) -> Found:
    """The best of n pictures; see `Search`."""
    assert isinstance(recipe.search, BestOfN)
    ends = particles.drawn(ids_of(recipe.search.particles))
    return _kept(ends, int(ends.reward.argmax()), {})


def _kept(ends: Ends, number: int, details: dict[str, float]) -> Found:
    rewards = {"rewards": ends.reward.tolist()}
    return Found(ends.images[number], float(ends.reward[number]), {**rewards, **details})
