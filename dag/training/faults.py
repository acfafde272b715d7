"""Finds numbers that are not finite before anything is trained on them, and reports which transitions they came from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dag.chain.trajectory import Trajectories
from dag.errors import DivergedError
from dag.objectives import ObjectiveOutput
from dag.run import durable
from dag.run.metrics import finite
from dag.run.processes import Processes

# Transitions that a dump shows if all losses are finite.
_SHOWN = 8


@dataclass(frozen=True)
class _Rows:
    """B transitions of step k, (B,) each."""

    k: int
    sample_id: Tensor
    loss: Tensor
    residual: Tensor | None
    ratio: Tensor


@dataclass
class Suspects:
    """A few numbers of each transition of the unfinished update, in case its gradient is not finite."""

    rows: list[_Rows] = field(default_factory=list)
    trajectories: Trajectories | None = None
    """The trajectories with their chains; None in one pass, which stores no chains."""

    def clear(self) -> None:
        self.rows, self.trajectories = [], None

    def add(self, k: int, sample_id: Tensor, output: ObjectiveOutput) -> None:
        """Remember a micro-batch of transitions of step k; `sample_id` is (B,)."""
        self.rows.append(_Rows(k, sample_id, output.loss.detach(), output.residual, output.ratio))

    def worst(self) -> list[dict[str, Any]]:
        """The transitions whose loss is not finite; if there are none, those with the largest loss."""
        found = [
            {
                "sample_id": sample,
                "k": rows.k,
                "loss": float(rows.loss[i]),
                "residual": None if rows.residual is None else float(rows.residual[i]),
                "ratio": float(rows.ratio[i]),
            }
            for rows in self.rows
            for i, sample in enumerate(rows.sample_id.tolist())
        ]
        size = torch.tensor([row["loss"] for row in found]).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        order = [found[i] for i in size.argsort(descending=True, stable=True).tolist()]
        bad = [row for row, loss in zip(order, size.sort(descending=True, stable=True)[0], strict=True) if loss.isinf()]
        return bad or order[:_SHOWN]

    def states(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """x_t and x_next of the transitions `rows`, by a name with sample and step; empty if no chain is stored."""
        trajectories, states = self.trajectories, {}
        if trajectories is None:
            return {}
        for row in rows:
            index = (trajectories.sample_id == row["sample_id"]).nonzero()[0]
            name = f"sample_{row['sample_id']}_step_{row['k']}"
            states[f"{name}_x_t"] = trajectories.states(row["k"], index)[0].cpu().clone()
            states[f"{name}_x_next"] = trajectories.states(row["k"] + 1, index)[0].cpu().clone()
        return states


class NotFiniteError(DivergedError):
    """A rollout was not finite, or gradients were not, several times in a row. Nothing has been trained on them.

    Args:
        suspects: the transitions of the update whose gradient was not finite, if they are known.
    """

    def __init__(self, message: str, suspects: Suspects | None = None) -> None:
        self.suspects = suspects
        super().__init__(message)


def dump(folder: Path, name: str, rows: list[dict[str, Any]], states: dict[str, Tensor]) -> Path:
    """Write transitions to folder/name.json and their states, if any, to name.safetensors. Returns the path of the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    # JSON has no number that is not finite, hence a text.
    stored = [{key: value if finite(value) == value else repr(value) for key, value in row.items()} for row in rows]
    durable.write_json(folder / f"{name}.json", {"transitions": stored})
    if states:
        save_file(states, folder / f"{name}.safetensors")
    return folder / f"{name}.json"


def dumped(error: NotFiniteError, processes: Processes, folder: Path, update: int) -> str:
    """Write the transitions that an error names; returns the end of a sentence that says where, or "". A collective."""
    suspects = error.suspects
    if suspects is None:
        return ""
    worst = suspects.worst()
    found = processes.objects((worst, suspects.states(worst)))
    if not processes.is_main:
        return ""
    rows = [row for rows, _ in found for row in rows]
    states = {name: tensor for _, tensors in found for name, tensor in tensors.items()}
    return f"; the transitions are in {dump(folder, f'update_{update:06d}', rows, states)}"


def not_finite(trajectories: Trajectories) -> str | None:
    """A sentence about the first number of a rollout that is not finite; None if all are finite."""
    tables = {"log P_F": trajectories.log_pf, "log P_B": trajectories.log_pb, "reward": trajectories.reward[:, None]}
    if trajectories.x0_hat_reward is not None:
        tables["the forward-looking reward"] = trajectories.x0_hat_reward
    for name, table in tables.items():
        if not bool(table.isfinite().all()):
            bad = (~table.isfinite()).nonzero()
            row, k = bad[0].tolist()
            at = "" if name == "reward" else f" at step {k}"
            return f"{name} of sample {int(trajectories.sample_id[row])}{at} is {float(table[row, k])}"
    return None
