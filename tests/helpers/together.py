"""What each of the two processes that `test_processes.py` starts does."""

import json
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from helpers.building import NEVER, Soon
from safetensors.torch import save_file
from torch import Tensor

from dag.errors import RunError, StoppedError
from dag.recipe import Recipe
from dag.recipe.load import parse
from dag.run.folder import RunFolder
from dag.run.processes import Processes
from dag.training import outputs
from dag.training.build import Components, build
from dag.training.trainer import Trainer

_DISTURBED = 1  # rank of the process that gets the signal, the failure and the lack of memory
# Safe points before the signal: it comes in the second epoch, the first that trains the policy.
_STOP_AFTER = 9
# The reward is called five times for each tile (x0_hat at four states, the final picture): this call is in the second tile.
_FAIL_AT_CALL = 7


def trainer_of(recipe: Recipe, run: Path, processes: Processes, points: float = NEVER) -> Trainer:
    assert processes.accelerator is not None
    parts = build(recipe, processes.accelerator.device, lambda text: None, processes=processes)
    interrupt = Soon(points if processes.rank == _DISTURBED else NEVER, signal.SIGINT)
    return Trainer(recipe, RunFolder(run), parts, processes=processes, interrupt=interrupt)


def first_gradients(parts: Components) -> dict[str, Tensor]:
    """A dict that will hold the policy's gradients at the first optimizer step: summed over processes, not yet clipped."""
    stepper, seen = parts.learner.updates.policy, dict[str, Tensor]()
    original = stepper.step

    def step() -> float:
        if not seen:
            seen.update({str(i): p.grad.clone() for i, p in enumerate(stepper.parameters) if p.grad is not None})
        return original()

    stepper.step = step  # type: ignore[method-assign]
    return seen


def failing(parts: Components, error: Exception, at: int) -> None:
    """Make the reward raise once, at its n-th call."""
    original, calls = parts.reward.total, 0

    def total(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return original(*arguments, **options)

    parts.reward.total = total  # type: ignore[method-assign]


def disturbed(recipe: Recipe, folder: Path, processes: Processes) -> dict[str, Any]:
    """Three runs that are disturbed in one process only: stopped, failed, out of memory. The first two are resumed.

    Returns what this process saw of them.
    """
    outcome: dict[str, Any] = {}
    try:
        trainer_of(recipe, folder / "stopped", processes, points=_STOP_AFTER).fit()
    except StoppedError as error:
        outcome["stopped"] = [error.number, error.saved]
    trainer_of(recipe, folder / "stopped", processes).fit(is_resumed=True)

    trainer = trainer_of(recipe, folder / "failed", processes)
    if processes.rank == _DISTURBED:
        failing(trainer.components, RunError("no answer"), at=_FAIL_AT_CALL)
    try:
        trainer.fit()
    except RunError as error:
        outcome["failed"] = str(error)
    trainer_of(recipe, folder / "failed", processes).fit(is_resumed=True)

    wider = recipe.model_copy(update={"sampler": recipe.sampler.model_copy(update={"tile": 2})})
    trainer = trainer_of(wider, folder / "small", processes)
    if processes.rank == _DISTURBED:
        failing(trainer.components, torch.OutOfMemoryError("CUDA out of memory"), at=_FAIL_AT_CALL)
    trainer.fit()
    outcome["tile"] = trainer.tile
    return outcome


def main(recipes: Path, folder: Path) -> None:
    outputs.draw_curves = lambda rows, path: None  # drawing takes a fifth of a run this short
    processes = Processes(Accelerator(cpu=True))
    given = {name: parse(data, name) for name, data in json.loads(recipes.read_text()).items()}
    for name, recipe in given.items():
        trainer = trainer_of(recipe, folder / name, processes)
        gradients = first_gradients(trainer.components)
        trainer.fit()
        if processes.is_main:
            save_file(gradients, folder / name / "gradients.safetensors")
    outcome = processes.objects(disturbed(next(iter(given.values())), folder, processes))
    if processes.is_main:
        (folder / "outcome.json").write_text(json.dumps(outcome))
    assert processes.accelerator is not None
    processes.accelerator.end_training()
