"""State of an unfinished epoch: all that is needed to continue it after a restart.

Legend: N trajectories, B trajectories of a micro-batch, T transitions.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dag.chain.trajectory import ChainStore, Trajectories, concatenate
from dag.objectives import ObjectiveOutput

# Fields of stored trajectories that earlier versions called otherwise.
_RENAMED = {"looking": "x0_hat_reward"}


@dataclass
class UpdateSums:
    """Sums over micro-batches, from which the metrics of an epoch's updates are formed."""

    loss: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    ratio_dev: list[Tensor] = field(default_factory=list)
    updates: int = 0
    norms: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: dict[str, Any], device: torch.device) -> "UpdateSums":
        """What `state` gave, on the policy's device."""
        names = ("loss", "clipped", "ratio_dev")
        lists = {name: [] if stored[name] is None else list(stored[name].to(device)) for name in names}
        return cls(**lists, updates=stored["updates"], norms=stored["norms"])

    def state(self) -> dict[str, Any]:
        """A tree of tensors and plain values."""
        lists = {"loss": self.loss, "clipped": self.clipped, "ratio_dev": self.ratio_dev}
        stacked = {name: torch.stack(values) if values else None for name, values in lists.items()}
        return {**stacked, "updates": self.updates, "norms": self.norms}

    def extend(self, other: "UpdateSums") -> None:
        """Add an update's micro-batches."""
        self.loss += other.loss
        self.clipped += other.clipped
        self.ratio_dev += other.ratio_dev

    def add(self, output: ObjectiveOutput, loss: Tensor) -> None:
        """Add one micro-batch."""
        self.loss.append(loss)
        if self.updates == 0:  # later ones have moved the policy
            self.ratio_dev.append((output.ratio - 1).abs().max())
        if output.clipped is not None:
            self.clipped.append(output.clipped.float().mean())

    def end_update(self, norms: dict[str, float]) -> None:
        self.updates += 1
        for name, norm in norms.items():
            self.norms.setdefault(name, []).append(norm)


@dataclass
class EpochState:
    """How far an epoch has come. The gradients of the update under way are in the parameters."""

    epoch: int
    store: ChainStore
    """The chains of `sampled`."""
    points: int = 0
    """Safe points passed."""
    sampled: list[Trajectories] = field(default_factory=list)
    """Sampled and scored tiles, without their chains. One pass samples none beforehand."""
    has_begun: bool = False
    """Whether what comes before the first update is done."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Metrics from before the first update, in the end those of all updates."""
    advantages: Tensor | None = None
    """(N,) formed from the complete rollout, or None."""
    sums: UpdateSums = field(default_factory=UpdateSums)
    """Over the finished updates."""
    share: UpdateSums = field(default_factory=UpdateSums)
    """Over the update under way."""
    micro_batches: int = 0
    """How many micro-batches of the update under way are back-propagated."""
    drawn: list[Trajectories] = field(default_factory=list)
    """One pass: the finished updates' trajectories."""
    residuals: list[Tensor] = field(default_factory=list)
    """One pass: (N, T) of each finished update."""
    walked: list[Trajectories] = field(default_factory=list)
    """One pass: the finished micro-batches of the update under way."""
    log_F_tilde: list[Tensor] = field(default_factory=list)
    """One pass: (B, T) learnt flows of each of `walked`."""
    metrics: dict[str, Any] | None = None
    """The finished epoch's, before its evaluation."""

    @property
    def num_sampled(self) -> int:
        return sum(tile.num_trajectories for tile in self.sampled)

    @property
    def num_walked(self) -> int:
        """Trajectories of the update under way, in one pass."""
        return sum(tile.num_trajectories for tile in self.walked)

    def rollout(self) -> Trajectories:
        """All sampled trajectories with their chains."""
        return concatenate(self.sampled, self.store.finish())

    # -- the course of an epoch ----------------------------------------------------------------------------------

    def restart_update(self) -> None:
        """Forget the update under way; its gradients are the caller's to clear."""
        self.share, self.micro_batches = UpdateSums(updates=self.sums.updates), 0
        self.walked, self.log_F_tilde = [], []

    def end_update(self, norms: dict[str, float]) -> None:
        """Count the update under way as finished; in one pass `keep` follows."""
        self.sums.extend(self.share)
        self.sums.end_update(norms)
        self.share, self.micro_batches = UpdateSums(updates=self.sums.updates), 0

    def keep(self, drawn: Trajectories, residuals: Tensor) -> None:
        """One pass: what is left of a finished update's micro-batches."""
        self.drawn.append(drawn)
        self.residuals.append(residuals)
        self.walked, self.log_F_tilde = [], []

    def end_updates(self, metrics: dict[str, Any]) -> None:
        """Only the evaluation is left: the trajectories go."""
        self.sampled, self.drawn, self.residuals = [], [], []
        self.advantages, self.store, self.metrics = None, self.store.emptied(), metrics
        self.has_begun = False

    # -- on disk -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """A tree of tensors and plain values, for a checkpoint."""
        sampled = vars(concatenate(self.sampled, self.store.so_far())) if self.sampled else None
        return {"metrics": self.metrics, "sampled": sampled, "progress": self._progress() if self.has_begun else None}

    def _progress(self) -> dict[str, Any]:
        """How far the updates are."""
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
        }

    def load_state(self, stored: dict[str, Any], device: torch.device) -> None:
        """Continue from what `state` gave, on the policy's device; this state is a fresh one."""
        self.metrics = stored["metrics"]
        if stored["sampled"] is not None:
            rollout = _trajectories(stored["sampled"], device)
            self.store.put(rollout.chain)
            self.sampled = [rollout.without_chain()]
        progress = stored["progress"]
        if progress is None:
            return
        self.has_begun, self.measured, self.advantages = True, progress["metrics"], progress["per_trajectory"]
        self.sums, self.share = (UpdateSums.of(progress[name], device) for name in ("outcome", "share"))
        self.micro_batches = progress["micro_batches"]
        self.drawn, self.walked = (
            [_trajectories(one, device) for one in progress[name]] for name in ("drawn", "tiles")
        )
        self.residuals, self.log_F_tilde = (
            [table.to(device) for table in progress[name]] for name in ("residuals", "log_F_tilde")
        )


def _trajectories(stored: dict[str, Any], device: torch.device) -> Trajectories:
    return Trajectories(**{_RENAMED.get(name, name): value for name, value in stored.items()}).to(device)
