"""Writes the checkpoints of a run, and resumes a run from one.

A checkpoint holds the trained weights, optimizer states, scales and counters, which are the same in every process, the metrics
so far, and the rollouts that each process keeps for `data.replay`. One taken inside an epoch also holds the `EpochState` of each
process, and the gradients of its unfinished update. The files' keys are those of format 2 (`flight`, `rests`), whatever the code
calls them today.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dag.errors import RunError
from dag.run import checkpoint, optimizer_state, tree
from dag.run.checkpoint import Position
from dag.run.folder import RunFolder
from dag.run.processes import Processes
from dag.training.build import Components
from dag.training.epoch_state import EpochState
from dag.training.replay import Replay

_METRICS = "metrics.jsonl"


@dataclass
class Checkpoints:
    """Writes and reads the checkpoints of one run."""

    run: RunFolder
    components: Components
    processes: Processes
    keep: int
    replay: Replay

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self, position: Position, epoch: EpochState | None, seconds: dict[str, float], tile: int) -> str:
        """Write a checkpoint; returns its name. Every process calls this, the main one writes.

        Args:
            epoch:   the unfinished epoch; None between two epochs.
            seconds: seconds of that epoch so far, by phase.
            tile:    samples per network call.

        Raises:
            RunError: it cannot be written, in every process. Earlier checkpoints stay, see `dag.run.checkpoint.save`.
        """
        flight = [] if epoch is None else self._of_all(self._unfinished(epoch))
        kept = self._of_all(self.replay.state()) if self.replay.rollouts else []
        problem = None
        if self.processes.is_main:
            groups = self._groups()
            for kind, of_all in (("flight", flight), ("replay", kept)):
                groups |= {f"{kind}_{rank}": group for rank, (_, group) in enumerate(of_all)}
            state = {
                "epoch": position.epoch,
                "rests": position.points,
                "processes": self.processes.size,
                "fingerprint": self.components.fingerprint,
                "tile": tile,
                "seconds": seconds,
                "learner": self.components.learner.state_dict(),
                "optimizers": {name: optimizer_state.numbers_of(one) for name, one in self._optimizers()},
                "flight": [stored for stored, _ in flight],
                "replay": [stored for stored, _ in kept],
            }
            try:
                texts = {_METRICS: self.run.metrics.text()}
                checkpoint.save(self.run.checkpoints, position, groups, state, self.keep, texts)
            except (RunError, OSError) as error:
                problem = str(error)
        problem = self.processes.from_main(problem)
        if problem is not None:
            raise RunError(problem)
        return position.name

    def _of_all(self, state: Any) -> list[tuple[Any, dict[str, Tensor]]]:
        """[(JSON, tensors on the CPU)] of a tree, of every process."""
        tensors: dict[str, Tensor] = {}
        packed = tree.packed(state, tensors)
        return self.processes.objects((packed, {name: tensor.cpu() for name, tensor in tensors.items()}))

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that are the same in every process, by file and name."""
        groups = {"policy": self.components.policy.state_dict(), "learner": self.components.learner.tensors()}
        if self.components.flow is not None:
            groups["flow"] = self.components.flow.state_dict()
        if (critic := self.components.learner.critic_fit) is not None:
            groups["critic"] = critic.tensors()
        return groups | {f"optimizer_{name}": optimizer_state.tensors_of(one) for name, one in self._optimizers()}

    def _unfinished(self, epoch: EpochState) -> dict[str, Any]:
        """This process's state of an unfinished epoch, and the gradients of its unfinished update."""
        gradients = None
        if epoch.has_begun and epoch.micro_batches:
            optimizers = self.components.learner.updates.optimizers()
            gradients = {optimizer.name: [p.grad for p in optimizer.parameters] for optimizer in optimizers}
        return {**epoch.state(), "gradients": gradients}

    def _optimizers(self) -> Iterator[tuple[str, torch.optim.Optimizer]]:
        """(name, optimizer) of the policy and, if there are any, the flow and the critic."""
        for optimizer in self.components.learner.optimizers():
            yield optimizer.name, optimizer.optimizer

    # -- resuming ------------------------------------------------------------------------------------------------

    def find(self) -> tuple[Path | None, list[str]]:
        """(the newest checkpoint that can be resumed, or None if there is none; one line for each newer one that cannot).

        Raises:
            RunError: there are checkpoints, and none can be used.
        """
        found: Any = None
        if self.processes.is_main:
            with suppress(OSError):  # of a disk that cannot be written, the next checkpoint tells
                checkpoint.clean(self.run.checkpoints)
            try:
                found = checkpoint.newest(self.run.checkpoints, self._objection)
            except RunError as error:
                found = error
        # All processes take the main one's choice: a shared disk may show others a different folder.
        found = self.processes.from_main(found)
        if isinstance(found, RunError):
            raise found
        return found

    def _objection(self, state: dict[str, Any]) -> str | None:
        """Why a complete checkpoint with this state.json cannot be resumed, or None."""
        now, then = self.components.fingerprint, state["fingerprint"]
        if changed := [name for name in now if now[name] != then.get(name)]:
            return f"was trained on another {' and another '.join(changed)} than this recipe names now"
        if state["processes"] == self.processes.size:
            return None
        if state["flight"]:
            return f"was taken inside an epoch by {state['processes']} processes, this launch has {self.processes.size}"
        if state.get("replay"):
            return f"holds the rollouts of {state['processes']} processes, this launch has {self.processes.size}"
        return None

    def load(self, folder: Path, fresh: EpochState) -> tuple[dict[str, Any], EpochState | None]:
        """Restore everything but the metrics file; returns state.json and the unfinished epoch, or None if there is none.

        Args:
            fresh: a new state, into which the unfinished epoch is restored.
        """
        state, learner = checkpoint.load_state(folder), self.components.learner
        self.components.policy.load_state_dict(checkpoint.load_tensors(folder, "policy"))
        learner.load_state_dict(state["learner"], checkpoint.load_tensors(folder, "learner"))
        if self.components.flow is not None:
            self.components.flow.load_state_dict(checkpoint.load_tensors(folder, "flow"))
        if learner.critic_fit is not None:
            learner.critic_fit.load(state["learner"]["critic"], checkpoint.load_tensors(folder, "critic"))
        for name, optimizer in self._optimizers():
            tensors = checkpoint.load_tensors(folder, f"optimizer_{name}")
            optimizer_state.restore(optimizer, tensors, state["optimizers"][name])
        rank = self.processes.rank
        if state.get("replay"):
            kept = tree.unpacked(state["replay"][rank], checkpoint.load_tensors(folder, f"replay_{rank}"))
            self.replay.load_state(kept, learner.device)
        if not state["flight"]:
            return state, None
        stored = tree.unpacked(state["flight"][rank], checkpoint.load_tensors(folder, f"flight_{rank}"))
        fresh.epoch, fresh.points = int(state["epoch"]), state["rests"]
        fresh.load_state(stored, learner.device)
        for clipped in learner.updates.optimizers() if stored["gradients"] is not None else ():
            for parameter, gradient in zip(clipped.parameters, stored["gradients"][clipped.name], strict=True):
                # In the parameter's own memory layout: the order in which a norm is summed, hence its bits, depends on it.
                parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)
        return state, fresh

    def metrics_of(self, folder: Path) -> str:
        """The content of metrics.jsonl when the checkpoint was taken."""
        return (folder / _METRICS).read_text(encoding="utf-8")
