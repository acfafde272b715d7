"""Optimizers, with gradient clipping and a check that gradients are finite."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dag.chain.policy import Weights
from dag.errors import UsageError
from dag.quiet import quieten
from dag.recipe import Train
from dag.training.faults import NotFiniteError, Suspects

# More skipped updates in a row than this end the run. A single overflow is ordinary in half precision.
_MAX_SKIPPED_UPDATES = 5


def build_optimizer(
    parameters: list[nn.Parameter], learning_rate: float, train: Train, kind: str
) -> torch.optim.Optimizer:
    """The optimizer `kind` (a value of `train.optimizer`). Raises UsageError if it needs bitsandbytes, which is not installed."""
    options: dict[str, Any] = {
        "lr": learning_rate,
        "betas": train.adam_betas,
        "weight_decay": train.weight_decay,
        "eps": 1e-8,
    }
    if kind == "adamw":
        # On a GPU the fused form updates all weights in one launch. On a CPU the plain form gives the numbers of earlier runs.
        return torch.optim.AdamW(parameters, **options, fused=parameters[0].is_cuda)
    quieten()
    try:
        import bitsandbytes
    except ImportError:
        raise UsageError(f"optimizer={kind} needs bitsandbytes: pip install bitsandbytes, or use adamw") from None
    for parameter in parameters:
        # Its kernels read memory in order and ignore the layout: saved states of another layout would be restored wrongly.
        parameter.data = parameter.data.contiguous()
    kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kinds[kind](parameters, **options)


def learning_rate(train: Train, update: int, updates: int) -> float:
    """The policy's learning rate in an update.

    Args:
        update:  its number, from 0.
        updates: of the complete training.
    """
    if train.learning_rate_schedule == "constant":
        return train.learning_rate
    return train.learning_rate * max(0.0, 1 - update / updates)


class ClippedOptimizer:
    """An optimizer that clips gradients, skips those that are not finite, and counts how many it skipped in a row.

    Args:
        name:       "policy", "flow" or "critic", for error messages and metrics.
        clip_norm:  largest norm of the gradient.
        weights:    the weights whose masters are the parameters; None if the network computes with the parameters themselves.
        use_scaler: scale losses against underflow, for fp16.
    """

    def __init__(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
        weights: Weights | None = None,
        use_scaler: bool = False,
    ) -> None:
        self.name, self.optimizer, self.clip_norm, self.weights = name, optimizer, clip_norm, weights
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler("cuda", enabled=use_scaler)
        self.skipped = 0

    def set_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def zero_grad(self) -> None:
        """Clear the gradients, also those of the weights' copies."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.weights is not None:
            self.weights.forget()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss () to the accumulated ones."""
        self.scaler.scale(loss).backward()
        if self.weights is not None:
            self.weights.gather()

    def step(self) -> float:
        """One optimizer step with the accumulated gradients, skipped if they are not finite. Returns their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip_norm))
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
            if self.weights is not None:
                self.weights.refresh()
        self.scaler.update()
        return norm

    def check(self, suspects: Suspects | None = None) -> None:
        """Raises NotFiniteError after more than _MAX_SKIPPED_UPDATES skipped updates in a row; `suspects` are its transitions."""
        if self.skipped > _MAX_SKIPPED_UPDATES:
            raise NotFiniteError(
                f"the {self.name}'s gradient was not finite {self.skipped} times in a row; lower its learning rate or beta",
                suspects,
            )
