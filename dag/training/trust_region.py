"""The trust region: an update that moves the policy too far is scaled back.

The KL of a step before the update and after it (`Schedule.policy_kl`) is measured on a few transitions of the update, in nats per
transition. While its mean is above `train.max_kl`, the update is
shortened to theta_before + s (theta - theta_before). Adam's moments stay as they are.

Legend: B transitions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dag.chain.policy import Policy
from dag.run.processes import Processes
from dag.training.embeddings import Embeddings
from dag.training.optimizer import ClippedOptimizer

# Transitions of each trained step on which the KL is measured.
PROBED = 8
# By how much a step is shortened at once, and the shortest that is tried.
_SHORTER, _SHORTEST = 0.7, 0.01


@dataclass(frozen=True)
class Probe:
    """B states before step k of trajectories of an update."""

    k: int
    x_t: Tensor
    """(B, C, H, W)."""
    prompt_id: Tensor
    """(B,) int64 on the CPU."""

    @classmethod
    def of(cls, stored: dict[str, Any], device: torch.device) -> "Probe":
        """The probe whose `vars` were stored, with its states on the policy's device."""
        return cls(stored["k"], stored["x_t"].to(device), stored["prompt_id"])


class TrustRegion:
    """Bounds the KL of each update of a policy.

    Args:
        max_kl: largest mean KL in nats per transition; None does not bound it.
        text:   embeddings of the recipe's prompts.
    """

    def __init__(
        self, max_kl: float | None, policy: Policy, text: Embeddings, optimizer: ClippedOptimizer, processes: Processes
    ) -> None:
        self.max_kl, self.policy, self.text = max_kl, policy, text
        self.optimizer, self.processes = optimizer, processes

    def step(self, probes: Sequence[Probe]) -> tuple[float, dict[str, float]]:
        """One optimizer step of the policy inside the region: (gradient norm, {the KL, the step's scale}).

        Without a bound the dict is empty and `probes` are not read.
        """
        if self.max_kl is None:
            return self.optimizer.step(), {}
        # On the CPU: for all weights of a denoiser it is as much memory as they need.
        before = [parameter.detach().to("cpu", copy=True) for parameter in self.optimizer.parameters]
        outputs = [self._output(probe) for probe in probes]
        norm, scale = self.optimizer.step(), 1.0
        if not math.isfinite(norm):
            return norm, {}
        kl = self._kl(probes, outputs)
        while kl > self.max_kl and scale > _SHORTEST:
            scale *= _SHORTER
            self._shorten(before)
            kl = self._kl(probes, outputs)
        return norm, {"update_kl": kl, "step_scale": scale}

    @torch.no_grad()
    def _shorten(self, before: Sequence[Tensor]) -> None:
        """Take back a part of the update."""
        for parameter, start in zip(self.optimizer.parameters, before, strict=True):
            parameter.copy_(torch.lerp(start.to(parameter.device), parameter, _SHORTER))
        self.policy.weights.refresh()

    @torch.no_grad()
    def _output(self, probe: Probe) -> Tensor:
        """(B, C, H, W) the policy's output, after guidance."""
        t = self.policy.schedule.timesteps[probe.k].expand(len(probe.x_t))
        return self.policy.predict(probe.x_t, t, self.text.rows(probe.prompt_id)).guided

    def _kl(self, probes: Sequence[Probe], before: Sequence[Tensor]) -> float:
        """The mean KL of the probes of all processes from the outputs (B, C, H, W) before the update."""
        pairs = zip(probes, before, strict=True)
        each = [self.policy.schedule.policy_kl(self._output(probe), output, probe.k) for probe, output in pairs]
        return float(self.processes.sum(torch.cat(each).mean())) / self.processes.size
