"""Training on trajectories that the present policy did not sample: earlier rollouts, and log P_F of any trajectories.

An objective that can do so (`Objective.needs_own_rollouts`) has a loss of the present policy on each trajectory, not an
expectation over sampled ones. The ratio of P_F now to P_F at sampling time has no part in it: it is 1, and where log P_F enters
the weight of a gradient, it is computed anew before each update.

Legend: N trajectories, T transitions.
"""

from dataclasses import replace
from typing import Any

import torch

from dag.chain.trajectory import Rows, Trajectories, cut
from dag.training.epoch_state import restored
from dag.training.loss import Loss, Rollout


class Replay:
    """The last rollouts of a process, the oldest first.

    Args:
        count: how many are kept.
        place: where their chains are.
        ends_only: keep the last states alone, for objectives that noise them anew.
    """

    def __init__(self, count: int, place: torch.device, *, ends_only: bool) -> None:
        self.count, self.place, self.ends_only = count, place, ends_only
        self.rollouts: list[Trajectories] = []

    def keep(self, trajectories: Trajectories) -> None:
        """Keep a rollout, and drop the oldest if there are too many."""
        if self.count == 0:
            return
        chain = trajectories.chain[-1:].clone() if self.ends_only else trajectories.chain
        kept = replace(trajectories, chain=chain, x0_hat_reward=None, previews=None)
        self.rollouts = [*self.rollouts, kept][-self.count :]

    def state(self) -> list[dict[str, Any]]:
        """The rollouts as trees of tensors and plain values, for a checkpoint."""
        return [vars(rollout) for rollout in self.rollouts]

    def load_state(self, stored: list[dict[str, Any]], device: torch.device) -> None:
        """Restore what `state` returned; `device` is the policy's."""
        rollouts = [restored(one, device) for one in stored]
        self.rollouts = [replace(one, chain=one.chain.to(self.place)) for one in rollouts]


@torch.no_grad()
def with_present_log_pf(loss: Loss, rollout: Rollout, rows: Rows, size: int) -> Rollout:
    """The rollout with the present policy's log P_F for the trajectories `rows`.

    Args:
        size: trajectories per network call.
    """
    log_pf = rollout.trajectories.log_pf.clone()
    for part in cut(rows, size):
        for k in range(log_pf.shape[1]):
            x_t, x_next = (rollout.trajectories.states(step, part) for step in (k, k + 1))
            t, text = loss.schedule.timesteps[k].expand(len(x_t)), loss.text_of(rollout, part)
            log_pf[part, k] = loss.log_probs(x_t, x_next, loss.policy.predict(x_t, t, text), k).log_pf
    trajectories = replace(rollout.trajectories, log_pf=log_pf)
    terms = None if rollout.terms is None else loss.log_scale.terms(trajectories, rollout.epoch)
    return replace(rollout, trajectories=trajectories, terms=terms)
