"""Measures how much of an update's gradient is signal: `python tests/by_hand/gradient_agreement.py RECIPE [--after N]`.

Trains N epochs, then keeps the policy fixed and takes the gradients of the next updates, each from other trajectories. Prints
their mean pairwise cosine, which is the share of a gradient's squared length that is signal and not noise. With `--reference`,
overrides that make another recipe of it, also the mean cosine with the mean gradient of that recipe, at the same policy and on
other trajectories. Every step is trained, so that the steps that an update happens to draw do not matter.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dag.recipe.load import load
from dag.run.folder import RunFolder
from dag.training.build import build
from dag.training.trainer import Trainer

_ROLLOUTS = 4
_ALL_STEPS = (
    "train.step_fraction=1",
    "train.step_window=null",
    "train.step_choice=uniform",
    "train.max_kl=null",
    "evaluation.every=1000",
)


def gradients(trainer: Trainer, first: int) -> Tensor:
    """The policy's gradients (updates, weights) on new rollouts; flow and critic go on learning, the policy stays fixed."""
    optimizer, found = trainer.components.learner.updates.policy, list[Tensor]()

    def step() -> float:
        found.append(torch.cat([p.grad.flatten() for p in optimizer.parameters if p.grad is not None]))
        return 0.0

    optimizer.step = step  # type: ignore[method-assign]
    for epoch in range(first, first + _ROLLOUTS):
        trainer.begin_epoch(epoch)
        trainer.learn()
    trainer.state = None
    return functional.normalize(torch.stack(found), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--after", type=int, default=4)
    parser.add_argument("--reference", action="append", default=[])
    given = parser.parse_args()
    epochs = given.after + 3 * _ROLLOUTS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def trainer_of(overrides: list[str], folder: str) -> Trainer:
        recipe = load(given.recipe, [*overrides, *_ALL_STEPS, f"train.epochs={epochs}"])
        return Trainer(recipe, RunFolder.create(Path(folder) / "run"), build(recipe, device))

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other_folder:
        trainer = trainer_of(given.set, folder)
        for epoch in range(given.after):
            trainer.train_epoch(epoch)
        policy = trainer.components.policy.state_dict()
        rows = gradients(trainer, max(given.after, trainer.recipe.warmup_epochs))
        cosine = (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)]
        line = f"{len(rows)} gradients, mean pairwise cosine {cosine.mean():.4f}"
        if given.reference:
            reference = trainer_of([*given.set, *given.reference], other_folder)
            reference.components.policy.load_state_dict(policy)
            mean = gradients(reference, given.after + 2 * _ROLLOUTS).mean(0)
            line += f", with the reference {(rows @ functional.normalize(mean, dim=0)).mean():.4f}"
    each = trainer.recipe.train.trajectories // trainer.recipe.train.updates
    print(f"{trainer.recipe.objective.name}, {each} trajectories an update: {line}")


if __name__ == "__main__":
    main()
