"""What a checkpoint of a run holds, and how a run goes on from it.

Weights, optimizers, flow, scales and counters, which are the same in every process; the metrics so far; inside an epoch also
what each process has in flight: sampled trajectories, finished micro-batches and the gradients they left.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dag.errors import RunError
from dag.run import checkpoint, optimizer_state
from dag.run.checkpoint import Position
from dag.run.folder import RunFolder
from dag.run.processes import Processes
from dag.training.build import Parts
from dag.training.epoch_state import Flight, Progress, packed, unpacked

_METRICS = "metrics.jsonl"


@dataclass
class Saver:
    """Writes and reads the checkpoints of one run."""

    run: RunFolder
    parts: Parts
    world: Processes
    keep: int

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self, position: Position, flight: Flight | None, seconds: dict[str, float], tile: int) -> str:
        """Write a checkpoint; returns its name. Every process calls this, the main one writes.

        Args:
            flight:  the epoch under way; None between two epochs.
            seconds: what the phases of that epoch have taken.
            tile:    samples per network call.

        Raises:
            RunError: it cannot be written; an earlier one is still there.
        """
        tensors: dict[str, Tensor] = {}
        mine = None if flight is None else packed(self._in_flight(flight), tensors)
        everyones = [] if flight is None else self.world.objects((mine, {k: v.cpu() for k, v in tensors.items()}))
        problem = None
        if self.world.is_main:
            groups = {**self._groups(), **{f"flight_{rank}": group for rank, (_, group) in enumerate(everyones)}}
            state = {
                "epoch": position.epoch,
                "rests": position.rests,
                "processes": self.world.size,
                "fingerprint": self.parts.fingerprint,
                "tile": tile,
                "seconds": seconds,
                "learner": self.parts.learner.state_dict(),
                "optimizers": {name: optimizer_state.numbers_of(one) for name, one in self._optimizers()},
                "flight": [told for told, _ in everyones],
            }
            try:
                texts = {_METRICS: self.run.metrics.text()}
                checkpoint.save(self.run.checkpoints, position, groups, state, self.keep, texts)
            except (RunError, OSError) as error:
                problem = str(error)
        problem = self.world.from_main(problem)
        if problem is not None:
            raise RunError(problem)
        return position.name

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        """Tensors that are the same in every process."""
        groups = {"policy": self.parts.policy.state_dict(), "learner": self.parts.learner.tensors()}
        if self.parts.flow is not None:
            groups["flow"] = self.parts.flow.state_dict()
        return groups | {f"optimizer_{name}": optimizer_state.tensors_of(one) for name, one in self._optimizers()}

    def _in_flight(self, flight: Flight) -> dict[str, Any]:
        learner = self.parts.learner
        progress, gradients = learner.progress, None
        if progress is not None and progress.micro_batches:
            gradients = {stepper.name: [p.grad for p in stepper.parameters] for stepper in learner.updates.steppers()}
        return {
            **flight.state(),
            "progress": None if progress is None else progress.state(),
            "gradients": gradients,
        }

    def _optimizers(self) -> Iterator[tuple[str, torch.optim.Optimizer]]:
        for stepper in self.parts.learner.updates.steppers():
            yield stepper.name, stepper.optimizer

    # -- resuming ------------------------------------------------------------------------------------------------

    def find(self) -> tuple[Path | None, list[str]]:
        """(the newest checkpoint that this launch can go on from, or None if there is none; why newer ones cannot be).

        Raises:
            RunError: there are checkpoints, and none can be used.
        """
        found: Any = None
        if self.world.is_main:
            try:
                found = checkpoint.newest(self.run.checkpoints, self._objection)
            except RunError as error:
                found = error
        # All take the one that the main process took, also where a shared disk shows them another.
        found = self.world.from_main(found)
        if isinstance(found, RunError):
            raise found
        return found

    def _objection(self, state: dict[str, Any]) -> str | None:
        mine, theirs = self.parts.fingerprint, state["fingerprint"]
        if changed := [name for name in mine if mine[name] != theirs.get(name)]:
            return f"was trained on another {' and another '.join(changed)} than this recipe names now"
        if state["flight"] and state["processes"] != self.world.size:
            return f"was taken inside an epoch by {state['processes']} processes, this launch has {self.world.size}"
        return None

    def load(self, folder: Path, flight: Flight) -> tuple[dict[str, Any], Flight | None]:
        """Restore everything but the metrics file; returns state.json and the epoch under way, if there was one.

        Args:
            flight: a fresh one to restore into.
        """
        state = checkpoint.load_state(folder)
        learner = self.parts.learner
        self.parts.policy.load_state_dict(checkpoint.load_tensors(folder, "policy"))
        learner.load_state_dict(state["learner"], checkpoint.load_tensors(folder, "learner"))
        if self.parts.flow is not None:
            self.parts.flow.load_state_dict(checkpoint.load_tensors(folder, "flow"))
        for name, optimizer in self._optimizers():
            tensors = checkpoint.load_tensors(folder, f"optimizer_{name}")
            optimizer_state.restore(optimizer, tensors, state["optimizers"][name])
        if not state["flight"]:
            return state, None
        rank = self.world.rank
        told = unpacked(state["flight"][rank], checkpoint.load_tensors(folder, f"flight_{rank}"))
        flight.epoch = int(state["epoch"])
        flight.load_state(told, learner.device)
        if told["progress"] is not None:
            learner.progress = Progress.of(told["progress"], learner.device)
        for stepper in learner.updates.steppers() if told["gradients"] is not None else ():
            for parameter, gradient in zip(stepper.parameters, told["gradients"][stepper.name], strict=True):
                # In the parameter's own memory layout, in whose order norms are summed.
                parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)
        return state, flight

    def metrics_of(self, folder: Path) -> str:
        """metrics.jsonl as it was when the checkpoint was taken."""
        return (folder / _METRICS).read_text(encoding="utf-8")
