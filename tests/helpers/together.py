"""What `test_processes.py` runs in each process: torchrun --nproc_per_node 2 tests/helpers/together.py RECIPES FOLDER."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from helpers.building import Soon
from safetensors.torch import save_file
from torch import Tensor

from dag.errors import RunError, StoppedError
from dag.recipe import Recipe
from dag.recipe.load import parse
from dag.run.folder import RunFolder
from dag.run.processes import Processes
from dag.training.build import Components, build
from dag.training.trainer import Trainer

_DISTURBED = 1  # the process to which things happen


def trainer_of(recipe: Recipe, run: Path, world: Processes, points: float = 1e9) -> Trainer:
    assert world.accelerator is not None
    parts = build(recipe, world.accelerator.device, lambda text: None, processes=world)
    interrupt = Soon(points if world.rank == _DISTURBED else 1e9, signal.SIGINT)
    return Trainer(recipe, RunFolder(run), parts, processes=world, interrupt=interrupt)


def first_gradients(parts: Components) -> dict[str, Tensor]:
    """Fills with the policy's gradients as the first optimizer step sees them: summed, not yet clipped."""
    stepper, seen = parts.learner.updates.policy, dict[str, Tensor]()
    original = stepper.step

    def step() -> float:
        if not seen:
            seen.update({str(i): p.grad.clone() for i, p in enumerate(stepper.parameters) if p.grad is not None})
        return original()

    stepper.step = step  # type: ignore[method-assign]
    return seen


def failing(parts: Components, error: Exception, at: int) -> None:
    """The reward raises once, at its n-th call."""
    original, calls = parts.reward.total, 0

    def total(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return original(*arguments, **options)

    parts.reward.total = total  # type: ignore[method-assign]


def disturbed(recipe: Recipe, folder: Path, world: Processes) -> dict[str, Any]:
    """A run that one process stops, another that one fails in, a third in which one runs out of memory; all go on."""
    told: dict[str, Any] = {}
    try:
        trainer_of(recipe, folder / "stopped", world, points=9).fit()
    except StoppedError as error:
        told["stopped"] = [error.number, error.saved]
    trainer_of(recipe, folder / "stopped", world).fit(is_resumed=True)

    trainer = trainer_of(recipe, folder / "failed", world)
    if world.rank == _DISTURBED:
        failing(trainer.components, RunError("no answer"), at=7)
    try:
        trainer.fit()
    except RunError as error:
        told["failed"] = str(error)
    trainer_of(recipe, folder / "failed", world).fit(is_resumed=True)

    wider = recipe.model_copy(update={"sampler": recipe.sampler.model_copy(update={"tile": 2})})
    trainer = trainer_of(wider, folder / "small", world)
    if world.rank == _DISTURBED:
        failing(trainer.components, torch.OutOfMemoryError("CUDA out of memory"), at=7)
    trainer.fit()
    told["tile"] = trainer.tile
    return told


def main(recipes: Path, folder: Path) -> None:
    world = Processes(Accelerator(cpu=True))
    given = {name: parse(data, name) for name, data in json.loads(recipes.read_text()).items()}
    for name, recipe in given.items():
        trainer = trainer_of(recipe, folder / name, world)
        gradients = first_gradients(trainer.components)
        trainer.fit()
        if world.is_main:
            save_file(gradients, folder / name / "gradients.safetensors")
    told = world.objects(disturbed(next(iter(given.values())), folder, world))
    if world.is_main:
        (folder / "told.json").write_text(json.dumps(told))
    assert world.accelerator is not None
    world.accelerator.end_training()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
