"""Statistics within the groups of an update: trajectories that share their prompt, next to each other.

Legend: N rows, groups of K = `per_group` of them. With K = 1 the whole update is one group.
"""

from torch import Tensor

from dag.objectives.transition import leave_one_out_mean


def grouped(values: Tensor, per_group: int) -> Tensor:
    """(K, G, ...) rows (N, ...) with a column for each of the G groups."""
    size = len(values) if per_group == 1 else per_group
    return values.unflatten(0, (-1, size)).transpose(0, 1)


def ungrouped(values: Tensor) -> Tensor:
    """(N, ...) the rows of `grouped` values (K, G, ...), in their first order."""
    return values.transpose(0, 1).flatten(0, 1)


def centred(values: Tensor, per_group: int) -> Tensor:
    """(N, ...) values minus the mean of the others in their group. Raises ValueError for a group of one."""
    columns = grouped(values, per_group)
    return ungrouped(columns - leave_one_out_mean(columns))
