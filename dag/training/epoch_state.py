"""How far an epoch has come: everything that its rest needs, so that it can be saved between two micro-batches.

`packed` and `unpacked` turn such a state into named tensors and JSON, and back.

Legend: N trajectories, T transitions.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from dag.chain.trajectory import ChainStore, Trajectories, concatenate
from dag.objectives import ObjectiveOutput


@dataclass
class Outcome:
    """Sums over the micro-batches of one rollout."""

    loss: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    ratio_dev: list[Tensor] = field(default_factory=list)
    updates: int = 0
    norms: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> "Outcome":
        """What `state` told, on the policy's device."""
        names = ("loss", "clipped", "ratio_dev")
        lists = {name: [] if state[name] is None else list(state[name].to(device)) for name in names}
        return cls(**lists, updates=state["updates"], norms=state["norms"])

    def state(self) -> dict[str, Any]:
        """For `packed`."""
        lists = {"loss": self.loss, "clipped": self.clipped, "ratio_dev": self.ratio_dev}
        stacked = {name: torch.stack(values) if values else None for name, values in lists.items()}
        return {**stacked, "updates": self.updates, "norms": self.norms}

    def extend(self, other: "Outcome") -> None:
        """Add an update's micro-batches."""
        self.loss += other.loss
        self.clipped += other.clipped
        self.ratio_dev += other.ratio_dev

    def add(self, output: ObjectiveOutput, loss: Tensor) -> None:
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
class Progress:
    """How far the updates of an epoch are. The gradients of the update under way are in the parameters."""

    outcome: Outcome = field(default_factory=Outcome)
    """Of the finished updates."""
    share: Outcome = field(default_factory=Outcome)
    """Of the update under way."""
    micro_batches: int = 0
    """Of the update under way that are back-propagated."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Measured before the first update."""
    per_trajectory: Tensor | None = None
    """(N,) advantages formed from the whole rollout, or None."""
    drawn: list[Trajectories] = field(default_factory=list)
    """One pass: the finished updates' trajectories."""
    residuals: list[Tensor] = field(default_factory=list)
    """One pass: (N, T) of each finished update."""
    tiles: list[Trajectories] = field(default_factory=list)
    """One pass: the finished micro-batches of the update under way."""
    log_F_tilde: list[Tensor] = field(default_factory=list)
    """One pass: (B, T) learnt flows of each of `tiles`."""

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> "Progress":
        """What `state` told, on the policy's device."""
        drawn = {name: [Trajectories(**one).to(device) for one in state[name]] for name in ("drawn", "tiles")}
        outcomes = {name: Outcome.of(state[name], device) for name in ("outcome", "share")}
        tables = {name: [one.to(device) for one in state[name]] for name in ("residuals", "log_F_tilde")}
        return cls(**{**state, **drawn, **outcomes, **tables})

    def state(self) -> dict[str, Any]:
        """For `packed`."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        drawn = {name: [vars(one) for one in told[name]] for name in ("drawn", "tiles")}
        outcomes = {name: told[name].state() for name in ("outcome", "share")}
        return {**told, **drawn, **outcomes}

    def restart_update(self) -> None:
        """Forget the update under way; its gradients are the caller's to clear."""
        self.share, self.micro_batches = Outcome(updates=self.outcome.updates), 0
        self.tiles, self.log_F_tilde = [], []

    def end_update(self, norms: dict[str, float]) -> None:
        """Count the update under way as finished; in one pass `keep` follows."""
        self.outcome.extend(self.share)
        self.outcome.end_update(norms)
        self.share, self.micro_batches = Outcome(updates=self.outcome.updates), 0

    def keep(self, drawn: Trajectories, residuals: Tensor) -> None:
        """One pass: what is left of a finished update's micro-batches."""
        self.drawn.append(drawn)
        self.residuals.append(residuals)
        self.tiles, self.log_F_tilde = [], []


@dataclass
class Flight:
    """An epoch that has begun."""

    epoch: int
    store: ChainStore
    """The chains of `tiles`."""
    tiles: list[Trajectories] = field(default_factory=list)
    """Sampled and scored, without their chains."""
    metrics: dict[str, Any] | None = None
    """The finished epoch's, before its evaluation."""

    @property
    def num_sampled(self) -> int:
        return sum(tile.num_trajectories for tile in self.tiles)

    def end_updates(self, metrics: dict[str, Any]) -> None:
        """The evaluation alone is left: the trajectories go."""
        self.tiles, self.store, self.metrics = [], self.store.emptied(), metrics

    def state(self) -> dict[str, Any]:
        """For `packed`."""
        sampled = vars(concatenate(self.tiles, self.store.so_far())) if self.tiles else None
        return {"metrics": self.metrics, "sampled": sampled}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state` told."""
        self.metrics = state["metrics"]
        if state["sampled"] is not None:
            sampled = Trajectories(**state["sampled"]).to(device)
            self.store.put(sampled.chain)
            self.tiles = [sampled.without_chain()]


# -- as tensors and JSON ------------------------------------------------------------------------------------------


def packed(tree: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """JSON of a tree of dicts, lists, tensors and plain values; each tensor goes into `tensors` and leaves its name."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict):
        return {key: packed(value, tensors, f"{name}/{key}" if name else str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [packed(value, tensors, f"{name}/{index}") for index, value in enumerate(tree)]
    if isinstance(tree, torch.dtype):
        return {"dtype": str(tree).removeprefix("torch.")}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": repr(tree)}  # of a skipped update; JSON has no word for it
    return tree


def unpacked(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """What `packed` was given."""
    if isinstance(tree, dict):
        if tree.keys() == {"tensor"}:
            return tensors[tree["tensor"]]
        if tree.keys() == {"dtype"}:
            return getattr(torch, tree["dtype"])
        if tree.keys() == {"float"}:
            return float(tree["float"])
        return {key: unpacked(value, tensors) for key, value in tree.items()}
    return [unpacked(value, tensors) for value in tree] if isinstance(tree, list) else tree
