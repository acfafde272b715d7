"""The processes that train one run together, through accelerate. A single process communicates with nobody.

The trajectories of each update are dealt out to the processes in equal, consecutive shares. So a process's part of an epoch is
its share of the first update, then its share of the second, and so on. `groups` is the number of updates; gathered rows are put
back into the order that a single process has.

Operations that exchange values are collectives: every process must call them, in the same order.

Legend: W processes, N rows in all processes together, n = N / W rows in one process.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from dag.errors import UsageError

# Gradients are summed over the processes in buckets of about so many elements.
_BUCKET = 1 << 24
Value = TypeVar("Value")


class Processes:
    """The operations of one process on rows and values that the processes share.

    Args:
        accelerator: connects the processes; None is a single process.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator
        self.rank = 0 if accelerator is None else int(accelerator.process_index)
        self.size = 1 if accelerator is None else int(accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # -- rows ----------------------------------------------------------------------------------------------------

    def check_shares(self, trajectories: int, updates: int) -> None:
        """Raises UsageError if an update's trajectories cannot be dealt out equally."""
        if trajectories // updates % self.size:
            raise UsageError(
                f"train.trajectories / train.updates = {trajectories // updates} trajectories an update cannot be dealt out "
                f"to {self.size} processes equally"
            )

    def mine(self, rows: Tensor, groups: int = 1) -> Tensor:
        """This process's share (n, ...) of rows (N, ...) that every process has."""
        if self.size == 1:
            return rows
        dealt = rows.reshape(groups, self.size, -1, *rows.shape[1:])
        return dealt[:, self.rank].flatten(0, 1)

    def everyones(self, rows: Tensor, groups: int = 1) -> Tensor:
        """The rows (N, ...) of all processes, from each one's share (n, ...), in the order that a single process has."""
        if self.size == 1:
            return rows
        dealt = self._gather(rows).reshape(self.size, groups, -1, *rows.shape[1:])
        return dealt.transpose(0, 1).flatten(0, 2)

    def _gather(self, values: Tensor) -> Tensor:
        """The values (W * n, ...) of all processes, one process after the other, from each one's (n, ...)."""
        assert self.accelerator is not None
        return self.accelerator.gather(values.to(self.accelerator.device).contiguous()).to(values.device)

    # -- sums ----------------------------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over the processes."""
        return values if self.size == 1 else self._gather(values[None]).sum(0)

    def largest(self, values: Tensor) -> Tensor:
        """The elementwise maximum over the processes."""
        return values if self.size == 1 else self._gather(values[None]).amax(0)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set in any process."""
        return list(flags) if self.size == 1 else self.largest(torch.tensor(flags, dtype=torch.uint8)).bool().tolist()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes. A gradient that is None in all of them stays None."""
        if self.size == 1:
            return
        assert self.accelerator is not None
        for parameter, is_used in zip(parameters, self.any([p.grad is not None for p in parameters]), strict=True):
            if is_used and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for bucket in _buckets(gradients):
            joined = torch.cat([gradient.flatten() for gradient in bucket])
            parts = self.accelerator.reduce(joined, "sum").split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    # -- objects -------------------------------------------------------------------------------------------------

    def objects(self, value: Value) -> list[Value]:
        """The values of all processes, by rank."""
        return [value] if self.size == 1 else gather_object([value])

    def from_main(self, value: Value) -> Value:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        broadcast_object_list(box, from_process=0)
        return box[0]


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """The gradients in groups of at most `_BUCKET` elements; a larger gradient is a group of its own."""
    buckets: list[list[Tensor]] = [[]]
    filled = 0
    for gradient in gradients:
        if buckets[-1] and filled + gradient.numel() > _BUCKET:
            buckets.append([])
            filled = 0
        buckets[-1].append(gradient)
        filled += gradient.numel()
    return buckets if buckets[0] else []


ALONE = Processes()
