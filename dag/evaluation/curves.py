"""The curve of a run: reward, diversity and noun_top1 along training, read from the rows of metrics.jsonl and drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dag.run import durable

Rows = Sequence[dict[str, Any]]
"""The rows of one run's metrics.jsonl, one for each epoch."""


def trained(rows: Rows) -> list[dict[str, Any]]:
    """The rows of epochs that sampled trajectories."""
    return [row for row in rows if row.get("reward_mean") is not None]


def evaluated(rows: Rows) -> list[dict[str, Any]]:
    """The rows that have a fixed evaluation."""
    return [row for row in rows if row.get("eval_reward_mean") is not None]


def ends(rows: Rows) -> tuple[float, float]:
    """Mean reward of the sampled trajectories: (of the first epoch, over the last quarter of the epochs)."""
    rewards = [row["reward_mean"] for row in trained(rows)]
    last = rewards[-max(1, len(rewards) // 4) :]
    return rewards[0], sum(last) / len(last)


def at_reward(rows: Rows, reward: float, key: str) -> float | None:
    """The value of `key` at the moment when the fixed evaluation first reaches `reward`.

    Interpolates linearly between two evaluations. None if the reward is never reached, or if `key` was not measured.
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


def line(row: dict[str, Any], epochs: int) -> str:
    """One row of metrics.jsonl as a line to print; `epochs` is the run's total."""
    parts = [f"epoch {row['epoch']}/{epochs}"]
    if row.get("reward_mean") is not None:
        parts.append(f"reward {row['reward_mean']:.3f} ± {row['reward_std']:.3f}")
    for key, label in (
        ("residual_rms", "residual rms"),
        ("ratio_max_dev", "ratio dev"),
        ("eval_reward_mean", "eval reward"),
    ):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:.4g}")
    for key, label in (("diversity", "diversity"), ("noun_top1", "noun_top1")):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:.3f}")
    seconds = sum(value for key, value in row.items() if key.startswith("seconds_"))
    return "  ".join(parts) + (f"  {seconds:.1f} s" if seconds else "")


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a run to `path`: rewards (left), and diversity and noun_top1 if measured (right), against trajectories."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    drawn = trained(rows)
    x = [row["trajectories"] for row in drawn]
    mean, spread = (np.array([row[key] for row in drawn]) for key in ("reward_mean", "reward_std"))
    left.plot(x, mean, label="rollouts (mean, 1 sd)")
    left.fill_between(x, mean - spread, mean + spread, alpha=0.2)
    _plot_measured(left, rows, "eval_reward_mean", "fixed evaluation")
    left.set(xlabel="trajectories", ylabel="reward")
    left.legend(fontsize=8)
    for key, label in (("diversity", "diversity within a prompt"), ("noun_top1", "noun_top1")):
        _plot_measured(right, rows, key, label)
    right.set(xlabel="trajectories", ylim=(0, None))
    if right.lines:
        right.legend(fontsize=8)
    figure.tight_layout()
    with durable.replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


def _plot_measured(axis: Any, rows: Sequence[dict[str, Any]], key: str, label: str) -> None:
    points = [(row["trajectories"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
