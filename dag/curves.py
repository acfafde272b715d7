"""Reading the curve of a run: what rows of metrics.jsonl say about reward, diversity and fidelity along training."""

from collections.abc import Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]


def trained(rows: Rows) -> list[dict[str, Any]]:
    """Rows of epochs that drew trajectories."""
    return [row for row in rows if row.get("reward_mean") is not None]


def evaluated(rows: Rows) -> list[dict[str, Any]]:
    """Rows with a fixed evaluation."""
    return [row for row in rows if row.get("eval_reward_mean") is not None]


def ends(rows: Rows) -> tuple[float, float]:
    """Mean reward of the first epoch's trajectories, and of the last quarter's."""
    rewards = [row["reward_mean"] for row in trained(rows)]
    last = rewards[-max(1, len(rewards) // 4) :]
    return rewards[0], sum(last) / len(last)


def at_reward(rows: Rows, reward: float, key: str) -> float | None:
    """The value of `key` where the fixed evaluation first reaches a reward, linearly between two evaluations.

    None if it never does, or if `key` was not measured.
    """
    before: dict[str, Any] | None = None
    for row in evaluated(rows):
        if row.get(key) is None:
            return None
        if row["eval_reward_mean"] >= reward:
            if before is None:
                return float(row[key])
            share = (reward - before["eval_reward_mean"]) / (row["eval_reward_mean"] - before["eval_reward_mean"])
            return float(before[key] + share * (row[key] - before[key]))
        before = row
    return None
