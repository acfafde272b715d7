"""The memory of a reward's network, counted from its architecture; no weights are loaded."""

from dataclasses import dataclass
from functools import cache

import torch

from dag.costs.live_bytes import peak_of
from dag.recipe.reward_sections import RewardTerm, Tower
from dag.rewards.clip import DTYPES
from dag.rewards.stand_in import architecture


@dataclass(frozen=True)
class Footprint:
    """Memory of a reward network in bytes, on the reward's device."""

    weights: int
    activations: int
    """Bytes beyond the weights at the peak of a forward pass of `max_batch` pictures, without gradients."""
    gradient: int
    """Bytes beyond the weights at the peak of a forward and a backward pass to the pictures; 0 if none is asked for."""


def footprint(term: RewardTerm, differentiated: int = 0) -> Footprint:
    """The memory of the published network of this name; 0 for a reward without a network.

    A network from another path is assumed to have the published architecture.

    Args:
        differentiated: pictures of a backward pass.
    """
    if not isinstance(term, Tower):
        return Footprint(0, 0, 0)
    return _of_tower(term.name, DTYPES[term.dtype], term.max_batch, differentiated)


@cache  # Of the recipes with one lever each that a forecast compares, most have the same network.
def _of_tower(name: str, dtype: torch.dtype, max_batch: int, differentiated: int) -> Footprint:
    with torch.device("meta"):
        towers, score, size = architecture(name)
        pixels = torch.empty(max_batch, 3, size, size, dtype=dtype)
    weights = [p.requires_grad_(False) for tower in towers for p in tower.to(dtype).parameters()]

    def forward() -> None:
        with torch.no_grad():
            score(pixels)

    def there_and_back() -> None:
        pictures = torch.empty(differentiated, *pixels.shape[1:], dtype=dtype, device="meta", requires_grad=True)
        torch.autograd.grad(score(pictures).pooler_output.sum(), pictures)

    total = sum(weight.nbytes for weight in weights)
    gradient = peak_of(there_and_back, weights) - total if differentiated else 0
    return Footprint(total, peak_of(forward, [*weights, pixels]) - total, gradient)
