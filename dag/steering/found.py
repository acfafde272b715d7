"""What a search finds for one picture, and the interface of a search."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor

from dag.recipe.search_sections import SearchRecipe, Steering, Stepwise
from dag.steering.particles import Particles


@dataclass(frozen=True)
class Found:
    """The picture that a search keeps."""

    image: Tensor
    """(3, H, W) in [0, 1], on the CPU."""
    reward: float
    details: dict[str, Any] = field(default_factory=dict)
    """Numbers of the method, for JSON."""


Ids = Callable[[int], Tensor]
"""Gives so many ids of particles (count,) int64 that belong to one picture; the first has the noise of the plain picture."""
Search = Callable[[SearchRecipe, Particles, Ids, Generator], Found]
"""A search for one picture: (recipe, particles of its prompt, their ids, a generator for choices) -> what was found."""


def window_of(recipe: SearchRecipe, section: Steering | Stepwise) -> tuple[int, int]:
    """The first step that is searched, and the one after the last."""
    return section.window or (0, recipe.sampler.steps)
