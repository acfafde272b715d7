"""Measures how far slopes narrow residuals: `python tests/by_hand/slope_gain.py RECIPE [--set KEY=VALUE] [--fitted N]`.

Samples three rollouts of the pretrained policy. Slopes are fitted to the first N trajectories of one of them and judged on all
trajectories of the next. Prints the standard deviation of the residuals of each step, in nats, as means over the three fits.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dag.objectives.transition import slope_shift, with_slopes
from dag.recipe.load import load
from dag.run.folder import RunFolder
from dag.training.build import build
from dag.training.trainer import Trainer

_ROLLOUTS = 3


def tables(trainer: Trainer, epoch: int) -> tuple[Tensor, Tensor]:
    """(residuals (N, T), |x|^2 / D - 1 (N, T)) of a new rollout."""
    learner = trainer.components.learner
    trajectories = trainer.sample(trainer.begin_epoch(epoch))
    terms = learner.rollout(trajectories, epoch).terms
    assert learner.flow_fit is not None and terms is not None
    rows = slice(0, trajectories.num_trajectories)
    excess = learner.flow_fit.excess(trajectories, rows)
    assert excess is not None
    return learner.flow_fit.residuals(trajectories, terms, rows), excess


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--fitted", type=int, default=32)
    given = parser.parse_args()
    recipe = load(given.recipe, [*given.set, "flow.slopes=true"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, RunFolder.create(Path(folder) / "run"), build(recipe, device))
        rollouts = [tables(trainer, epoch) for epoch in range(_ROLLOUTS)]
    before, after, last = [], [], torch.empty(0)
    for number, (residuals, excess) in enumerate(rollouts):
        last = slope_shift(residuals[: given.fitted], excess[: given.fitted])
        held_out, its_excess = rollouts[(number + 1) % _ROLLOUTS]
        before.append(held_out.std(0))
        after.append(with_slopes(held_out, its_excess, last).std(0))
    rows = {"before": torch.stack(before).mean(0), "after": torch.stack(after).mean(0), "slopes": last}
    for name, row in rows.items():
        print(f"{name:7}" + "".join(f"{value:8.1f}" for value in row.tolist()))


if __name__ == "__main__":
    main()
