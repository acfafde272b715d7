"""Measures how much of an update's gradient is signal: `python tests/by_hand/gradient_agreement.py RECIPE [--after N]`.

Trains N epochs, then keeps the policy fixed and takes the gradients of the next updates, each from other trajectories. Prints
their mean pairwise cosine, which is the share of a gradient's squared length that is signal and not noise.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dag.recipe.load import load
from dag.run.folder import RunFolder
from dag.training.build import build
from dag.training.trainer import Trainer

_ROLLOUTS = 4


def gradients(trainer: Trainer, first: int) -> Tensor:
    """The policy's gradients (updates, weights) on new rollouts; the flow goes on learning, the policy stays fixed."""
    optimizer, found = trainer.components.learner.updates.policy, list[Tensor]()

    def step() -> float:
        found.append(torch.cat([p.grad.flatten() for p in optimizer.parameters if p.grad is not None]))
        return 0.0

    optimizer.step = step  # type: ignore[method-assign]
    for epoch in range(first, first + _ROLLOUTS):
        trainer.begin_epoch(epoch)
        trainer.learn()
    trainer.state = None
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--after", type=int, default=4)
    given = parser.parse_args()
    recipe = load(given.recipe, [*given.set, f"train.epochs={given.after + _ROLLOUTS}", "evaluation.every=1000"])
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        trainer = Trainer(recipe, RunFolder.create(Path(folder) / "run"), build(recipe, device))
        for epoch in range(given.after):
            trainer.train_epoch(epoch)
        rows = torch.nn.functional.normalize(gradients(trainer, given.after), dim=1)
    cosine = (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)]
    each = recipe.train.trajectories // recipe.train.updates
    print(
        f"{recipe.objective.name}: {len(rows)} gradients of {each} trajectories, mean pairwise cosine {cosine.mean():.3f}"
    )


if __name__ == "__main__":
    main()
