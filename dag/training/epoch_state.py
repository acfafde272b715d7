"""State of an unfinished epoch: all that is needed to continue it after a restart.

Legend: N trajectories, B trajectories of a micro-batch, T transitions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dag.chain.trajectory import ChainStore, Trajectories, concatenate
from dag.objectives import ObjectiveOutput
from dag.training.trust_region import Probe

# Today's names of fields of trajectories that earlier versions stored under another name.
_RENAMED = {"looking": "x0_hat_reward"}


@dataclass
class UpdateSums:
    """Numbers of micro-batches and updates, from which the metrics of an epoch are computed."""

    loss: list[Tensor] = field(default_factory=list)
    """() of each micro-batch: its share of the update's mean loss."""
    clipped: list[Tensor] = field(default_factory=list)
    """() of each micro-batch: the share of transitions whose ratio was outside the clip range."""
    ratio_dev: list[Tensor] = field(default_factory=list)
    """() of each micro-batch of the first update: the largest |ratio - 1|."""
    per_step: dict[str, Tensor] = field(default_factory=dict)
    """(T, 2) sums and counts of numbers of each step's transitions, by name."""
    updates: int = 0
    """Finished updates."""
    norms: dict[str, list[float]] = field(default_factory=dict)
    """The gradient norms of each finished update, by the optimizer's name."""
    bounded: dict[str, list[float]] = field(default_factory=dict)
    """What the trust region measured in each finished update, by name; empty without one."""

    @classmethod
    def of(cls, stored: dict[str, Any], device: torch.device) -> "UpdateSums":
        """The sums that `state` returned, on the policy's device."""
        names = ("loss", "clipped", "ratio_dev")
        lists = {name: [] if stored[name] is None else list(stored[name].to(device)) for name in names}
        per_step = {name: sums.to(device) for name, sums in stored.get("per_step", {}).items()}
        return cls(
            **lists,
            per_step=per_step,
            updates=stored["updates"],
            norms=stored["norms"],
            bounded=stored.get("bounded", {}),
        )

    def state(self) -> dict[str, Any]:
        """The sums as a tree of tensors and plain values, for a checkpoint."""
        lists = {"loss": self.loss, "clipped": self.clipped, "ratio_dev": self.ratio_dev}
        stacked = {name: torch.stack(values) if values else None for name, values in lists.items()}
        return {
            **stacked,
            "per_step": self.per_step,
            "updates": self.updates,
            "norms": self.norms,
            "bounded": self.bounded,
        }

    def extend(self, other: "UpdateSums") -> None:
        """Add the micro-batches of an update. Its norms are added by `end_update`."""
        self.loss += other.loss
        self.clipped += other.clipped
        self.ratio_dev += other.ratio_dev
        self._add_per_step(other.per_step)

    def add(self, output: ObjectiveOutput, loss: Tensor) -> None:
        """Add one micro-batch, whose share of the update's mean loss is `loss` ()."""
        self.loss.append(loss)
        if self.updates == 0:  # before the first update the ratio should be 1
            self.ratio_dev.append((output.ratio - 1).abs().max())
        if output.clipped is not None:
            self.clipped.append(output.clipped.float().mean())
        self._add_per_step(output.per_step)

    def _add_per_step(self, found: Mapping[str, Tensor]) -> None:
        for name, sums in found.items():
            self.per_step[name] = self.per_step[name] + sums if name in self.per_step else sums

    def end_update(self, norms: dict[str, float], bounded: dict[str, float]) -> None:
        """Count a finished update, with its gradient norms by the optimizer's name, and what the trust region measured."""
        self.updates += 1
        for kept, values in ((self.norms, norms), (self.bounded, bounded)):
            for name, value in values.items():
                kept.setdefault(name, []).append(value)


@dataclass
class EpochState:
    """How far an unfinished epoch has come. The gradients of its unfinished update are not here but in the parameters."""

    epoch: int
    store: ChainStore
    """The chains of the trajectories in `sampled`."""
    points: int = 0
    """Safe points passed."""
    sampled: list[Trajectories] = field(default_factory=list)
    """Sampled and scored tiles, without their chains. Empty in one pass."""
    given_store: ChainStore | None = None
    """The chains of the trajectories in `given`; None without `data.folder`."""
    given: list[Trajectories] = field(default_factory=list)
    """Scored tiles of given pictures, without their chains."""
    has_begun: bool = False
    """Whether the first update may start: the rollout's residuals and advantages are computed and the flow is
    fitted. One pass needs no such preparation."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Metrics of the rollout's residuals; after the last update also those of the updates."""
    advantages: Tensor | None = None
    """(N,) advantages that the objective formed from the complete rollout, or None."""
    sums: UpdateSums = field(default_factory=UpdateSums)
    """The sums of the finished updates."""
    share: UpdateSums = field(default_factory=UpdateSums)
    """The sums of the unfinished update."""
    micro_batches: int = 0
    """How many micro-batches of the unfinished update are back-propagated."""
    drawn: list[Trajectories] = field(default_factory=list)
    """One pass: the trajectories of each finished update, without their chains."""
    residuals: list[Tensor] = field(default_factory=list)
    """One pass: the residuals of each finished update, (N, T) for its trajectories in all processes."""
    walked: list[Trajectories] = field(default_factory=list)
    """One pass: the trajectories of each finished micro-batch of the unfinished update."""
    log_F_tilde: list[Tensor] = field(default_factory=list)
    """One pass: (B, T) learnt flows of each entry of `walked`."""
    excess: list[Tensor] = field(default_factory=list)
    """One pass: (B, T) `norm_excess` of the states of each entry of `walked`; empty for a flow without slopes."""
    probes: list[Probe] = field(default_factory=list)
    """One pass: transitions of the unfinished update on which `train.max_kl` is measured; empty without it."""
    metrics: dict[str, Any] | None = None
    """The epoch's metrics when all updates are finished and only the evaluation is left; None before."""

    @property
    def num_sampled(self) -> int:
        """Trajectories that are sampled and scored; 0 in one pass."""
        return sum(tile.num_trajectories for tile in self.sampled)

    @property
    def num_given(self) -> int:
        """Given pictures that are noised and scored."""
        return sum(tile.num_trajectories for tile in self.given)

    @property
    def num_walked(self) -> int:
        """One pass: trajectories of the unfinished update that are back-propagated."""
        return sum(tile.num_trajectories for tile in self.walked)

    def rollout(self) -> Trajectories:
        """All sampled trajectories with their chains."""
        return concatenate(self.sampled, self.store.finish())

    def given_rollout(self) -> Trajectories:
        """The trajectories of all given pictures with their chains."""
        assert self.given_store is not None
        return concatenate(self.given, self.given_store.finish())

    # -- the course of an epoch ----------------------------------------------------------------------------------

    def restart_update(self) -> None:
        """Forget the unfinished update. The caller clears its gradients."""
        self.share, self.micro_batches = UpdateSums(updates=self.sums.updates), 0
        self.walked, self.log_F_tilde, self.excess = [], [], []
        self.probes = []

    def end_update(self, norms: dict[str, float], bounded: dict[str, float]) -> None:
        """Count the unfinished update as finished. In one pass, call `keep` next."""
        self.sums.extend(self.share)
        self.sums.end_update(norms, bounded)
        self.share, self.micro_batches = UpdateSums(updates=self.sums.updates), 0

    def keep(self, drawn: Trajectories, residuals: Tensor) -> None:
        """One pass: keep the trajectories of the update just finished and their residuals (N, T)."""
        self.drawn.append(drawn)
        self.residuals.append(residuals)
        self.walked, self.log_F_tilde, self.excess = [], [], []
        self.probes = []

    def end_updates(self, metrics: dict[str, Any]) -> None:
        """Keep the epoch's metrics, and drop everything that only updates need."""
        self.sampled, self.given, self.drawn, self.residuals = [], [], [], []
        self.advantages, self.store, self.metrics = None, self.store.emptied(), metrics
        self.given_store = None if self.given_store is None else self.given_store.emptied()
        self.has_begun = False

    # -- on disk -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The state as a tree of tensors and plain values, for a checkpoint. Its keys are those of format 2 of checkpoints."""
        sampled = vars(concatenate(self.sampled, self.store.so_far())) if self.sampled else None
        state = {"metrics": self.metrics, "sampled": sampled, "progress": self._progress() if self.has_begun else None}
        if self.given and self.given_store is not None:
            state["given"] = vars(concatenate(self.given, self.given_store.so_far()))
        return state

    def _progress(self) -> dict[str, Any]:
        """The part of the state that updates change."""
        return {
            "outcome": self.sums.state(),
            "share": self.share.state(),
            "micro_batches": self.micro_batches,
            "metrics": self.measured,
            "per_trajectory": self.advantages,
            "drawn": [vars(one) for one in self.drawn],
            "residuals": self.residuals,
            "tiles": [vars(one) for one in self.walked],
            "log_F_tilde": self.log_F_tilde,
            "excess": self.excess,
            "probes": [vars(one) for one in self.probes],
        }

    def load_state(self, stored: dict[str, Any], device: torch.device) -> None:
        """Restore what `state` returned, on the policy's device, into this state, which must be new."""
        self.metrics = stored["metrics"]
        if stored["sampled"] is not None:
            rollout = restored(stored["sampled"], device)
            self.store.put(rollout.chain)
            self.sampled = [rollout.without_chain()]
        if "given" in stored:
            rollout = restored(stored["given"], device)
            assert self.given_store is not None
            self.given_store.put(rollout.chain)
            self.given = [rollout.without_chain()]
        progress = stored["progress"]
        if progress is None:
            return
        self.has_begun, self.measured, self.advantages = True, progress["metrics"], progress["per_trajectory"]
        self.sums, self.share = (UpdateSums.of(progress[name], device) for name in ("outcome", "share"))
        self.micro_batches = progress["micro_batches"]
        self.drawn, self.walked = ([restored(one, device) for one in progress[name]] for name in ("drawn", "tiles"))
        self.probes = [Probe.of(one, device) for one in progress.get("probes", [])]
        self.residuals, self.log_F_tilde = (
            [table.to(device) for table in progress[name]] for name in ("residuals", "log_F_tilde")
        )
        # Checkpoints of earlier versions lack it: their flows have no slopes.
        self.excess = [table.to(device) for table in progress.get("excess", [])]


def restored(stored: dict[str, Any], device: torch.device) -> Trajectories:
    """The trajectories whose `vars` were stored, with their scalars on the policy's device."""
    return Trajectories(**{_RENAMED.get(name, name): value for name, value in stored.items()}).to(device)
