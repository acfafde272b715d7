"""The ranges of sample ids, one for each purpose.

The id, the seed and the step determine a picture's noise, so no two purposes share ids: training would have to sample 2^40
trajectories to reach the next range.
"""

import torch
from torch import Tensor

from dag.recipe import Prompts

TRAINING = 0
"""First id of a run's trajectories, which are counted through all epochs."""
FIXED_EVALUATION = 1 << 40
"""First id of the pictures in a run's evaluations; every evaluation has the same ids."""
SAMPLES = 1 << 41
"""First id of the pictures of `python -m dag.sample`."""
COMPARISON = 1 << 42
"""First id of the pictures of `python -m dag.evaluate`; every model has the same ids."""
COMPARISON_AGAIN = 1 << 43
"""First id of the base model's second set of pictures in `python -m dag.evaluate`, to which distances are measured."""
SEARCH = 1 << 44
"""First id of the particles of `python -m dag.search`; each of its pictures has 2^16 ids, of which the first is not used."""
GIVEN = 1 << 46
"""First id of given pictures that are trained on (`data.folder`), counted through all epochs, up to the next whole group."""


def of_particles(picture: int, count: int) -> Tensor:
    """(count,) the ids of the particles of a search for one picture.

    The first is that of the picture of this number in `python -m dag.evaluate`: a search begins with the picture that it is
    compared with.
    """
    return torch.cat([torch.tensor([COMPARISON + picture]), SEARCH + (picture << 16) + torch.arange(1, count)])


def of_given(first: int, count: int, per_group: int) -> Tensor:
    """(count,) the ids of given pictures from the number `first` on, so that `first_of_group` finds their groups."""
    return -(-GIVEN // per_group) * per_group + first + torch.arange(count)


def first_of_group(sample_id: Tensor, per_group: int) -> Tensor:
    """(N,) the id of the first trajectory in the group of each: an update's groups are `per_group` neighbours."""
    return sample_id // per_group * per_group


def start_ids(prompts: Prompts, sample_id: Tensor) -> Tensor | None:
    """(N,) the ids whose first noise trajectories begin with, for `prompts.shared_start`; None for their own."""
    return first_of_group(sample_id, prompts.per_group) if prompts.shared_start else None
