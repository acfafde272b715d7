"""Earlier policies of a run: the trained weights at the starts of its last epochs, as references for preferences.

Legend: P trained parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dag.chain.policy import Policy


class PastPolicies:
    """The trained weights of earlier policies, the newest last, in CPU memory.

    Args:
        count: how many are kept.
    """

    def __init__(self, count: int, policy: Policy) -> None:
        self.count, self.policy = count, policy
        self.weights: list[list[Tensor]] = []

    def remember(self) -> None:
        """Keep the present weights, and drop the oldest if there are too many."""
        now = [master.detach().to("cpu", copy=True) for master in self.policy.weights.masters]
        self.weights = [*self.weights, now][-self.count :]

    @contextmanager
    def one_of(self, seed: int) -> Iterator[None]:
        """A context in which the policy has the weights of one of them, drawn with the seed; the present ones if none is kept."""
        if not self.weights:
            yield
            return
        number = int(torch.randint(len(self.weights), (), generator=torch.Generator().manual_seed(seed)))
        now = [master.detach().clone() for master in self.policy.weights.masters]
        self._set(self.weights[number])
        try:
            yield
        finally:
            self._set(now)

    @torch.no_grad()
    def _set(self, weights: list[Tensor]) -> None:
        for master, weight in zip(self.policy.weights.masters, weights, strict=True):
            master.copy_(weight)
        self.policy.weights.refresh()

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The weights by the number of their policy and their own."""
        return {f"past/{n}/{i}": weight for n, one in enumerate(self.weights) for i, weight in enumerate(one)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned; others are ignored."""
        found = sorted(tuple(map(int, name.split("/")[1:])) for name in tensors if name.startswith("past/"))
        self.weights = [
            [tensors[f"past/{n}/{i}"].clone() for m, i in found if m == n] for n in sorted({n for n, _ in found})
        ]
