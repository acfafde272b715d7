"""Numbers that are not finite: found before anything learns from them, and what they came from."""

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

# Transitions that a dump shows where no loss is to blame.
_SHOWN = 8


@dataclass(frozen=True)
class _Rows:
    """Transitions of one micro-batch."""

    k: int
    sample_id: Tensor
    loss: Tensor
    residual: Tensor | None
    ratio: Tensor


@dataclass
class Suspects:
    """The transitions of the update under way: a few numbers each."""

    rows: list[_Rows] = field(default_factory=list)
    trajectories: Trajectories | None = None
    """Where their states are; None in one pass, which keeps none."""

    def clear(self) -> None:
        self.rows, self.trajectories = [], None

    def add(self, k: int, sample_id: Tensor, output: ObjectiveOutput) -> None:
        """A micro-batch of step k."""
        self.rows.append(_Rows(k, sample_id, output.loss.detach(), output.residual, output.ratio))

    def worst(self) -> list[dict[str, Any]]:
        """Transitions whose loss is not finite, or else those with the largest."""
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
        """x_t and x_next of transitions, by sample and step; empty where no chain is kept."""
        drawn, kept = self.trajectories, {}
        if drawn is None:
            return {}
        for row in rows:
            at = (drawn.sample_id == row["sample_id"]).nonzero()[0]
            name = f"sample_{row['sample_id']}_step_{row['k']}"
            kept[f"{name}_x_t"] = drawn.states(row["k"], at)[0].cpu().clone()
            kept[f"{name}_x_next"] = drawn.states(row["k"] + 1, at)[0].cpu().clone()
        return kept


class NotFiniteError(DivergedError):
    """A rollout, or gradients several times in a row: nothing has learnt from them.

    Args:
        suspects: the transitions to blame, if they are known.
    """

    def __init__(self, message: str, suspects: Suspects | None = None) -> None:
        self.suspects = suspects
        super().__init__(message)


def dump(folder: Path, name: str, rows: list[dict[str, Any]], states: dict[str, Tensor]) -> Path:
    """Write folder/name.json and, if there are states, name.safetensors; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    # JSON has no word for what is not finite.
    stored = [{key: value if finite(value) == value else repr(value) for key, value in row.items()} for row in rows]
    durable.write_json(folder / f"{name}.json", {"transitions": stored})
    if states:
        save_file(states, folder / f"{name}.safetensors")
    return folder / f"{name}.json"


def not_finite(trajectories: Trajectories) -> str | None:
    """The first number of a rollout that is not finite, in words; None if all are."""
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
