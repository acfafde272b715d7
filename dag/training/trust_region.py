"""The trust region: an update that moved the policy too far from the one that sampled is scaled back.

    KL_k = 1/2 (b_k / sigma_k)^2 |o - o_old|^2,        the KL from the sampling policy's step to the present policy's

is measured after the optimizer's step on a few transitions of the update, in nats per transition. While its mean is above
`train.max_kl`, the step theta_old + s (theta - theta_old) is shortened. Adam's moments stay as they are.

Legend: B transitions.
"""

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
    """B transitions of step k, with the output of the policy that sampled them."""

    k: int
    x_t: Tensor
    """(B, C, H, W)."""
    output_old: Tensor
    """(B, C, H, W) float32, after guidance."""
    prompt_id: Tensor
    """(B,) int64 on the CPU."""

    @classmethod
    def of(cls, stored: dict[str, Any], device: torch.device) -> "Probe":
        """The probe whose `vars` were stored, with its states on the policy's device."""
        on_device = {name: stored[name].to(device) for name in ("x_t", "output_old")}
        return cls(k=stored["k"], prompt_id=stored["prompt_id"], **on_device)


class TrustRegion:
    """Bounds the KL from the sampling policy to the trained one.

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
        before = [parameter.detach().clone() for parameter in self.optimizer.parameters]
        norm = self.optimizer.step()
        after = [parameter.detach().clone() for parameter in self.optimizer.parameters]
        scale, kl = 1.0, self._kl(probes)
        while kl > self.max_kl and scale > _SHORTEST:
            scale *= _SHORTER
            self._move(before, after, scale)
            kl = self._kl(probes)
        return norm, {"kl_old": kl, "step_scale": scale}

    @torch.no_grad()
    def _move(self, before: Sequence[Tensor], after: Sequence[Tensor], scale: float) -> None:
        for parameter, start, end in zip(self.optimizer.parameters, before, after, strict=True):
            parameter.copy_(torch.lerp(start, end, scale))
        self.policy.weights.refresh()

    @torch.no_grad()
    def _kl(self, probes: Sequence[Probe]) -> float:
        """The mean KL of the probes of all processes."""
        schedule, each = self.policy.schedule, []
        for probe in probes:
            t = schedule.timesteps[probe.k].expand(len(probe.x_t))
            output = self.policy.predict(probe.x_t, t, self.text.rows(probe.prompt_id)).guided
            square = (output - probe.output_old).square().flatten(1).sum(1)
            each.append(0.5 * (schedule.mean_output[probe.k] / schedule.sigma[probe.k]).square() * square)
        return float(self.processes.sum(torch.cat(each).mean())) / self.processes.size
