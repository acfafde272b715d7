"""Align a text-to-image diffusion model with a reward.

    python train_dag.py --recipe recipes/tiny_cpu.yaml

Algorithm 1 of Zhang et al. (2025), as `dag.training.trainer.Trainer.fit` runs it:

    for each epoch:
        roll out P_F: chains x_T .. x_0; the rewards of x_0 and of each state's x0_hat   dag/chain/rollout.py
        residual(log F, log P_F, log P_B, log F') of every transition                    dag/objectives/transition.py
        its square (DAG-DB) or its score-function gradient (DAG-KL) moves P_F and F      dag/objectives/
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dag.errors import RunError, StoppedError, UsageError, exit_code, quiet_on_broken_pipe
from dag.recipe import Recipe, captions, prompts
from dag.recipe.load import flat, load
from dag.run.folder import RunFolder, default_path, newest_run
from dag.training import plan

# torchrun, and accelerate's launcher for several GPUs, set this variable in each process that they start.
NUM_PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Diffusion alignment with GFlowNets. Everything else is in the recipe."
    )
    parser.add_argument("--recipe", required=True, metavar="FILE", help="YAML recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key.sub=value", help="override a key of the recipe"
    )
    parser.add_argument("--out", metavar="DIR", help="run folder; default runs/<recipe>-<time>")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="continue DIR, or --out, or this recipe's newest run",
    )
    parser.add_argument("--plan", action="store_true", help="print what would run and stop")
    return parser.parse_args(argv)


def open_run(arguments: argparse.Namespace, config: Recipe) -> tuple[RunFolder, bool]:
    """(run folder, whether the run is resumed). Raises UsageError if the folder does not fit the arguments or the recipe."""
    name = Path(arguments.recipe).stem
    if arguments.resume is None:
        return RunFolder.create(Path(arguments.out) if arguments.out else default_path(name)), False
    run = RunFolder.open(Path(arguments.resume or arguments.out or newest_run(name)))
    _check_same_recipe(run.read_recipe(), config, run.path)
    return run, True


def _check_same_recipe(old: Recipe, new: Recipe, path: Path) -> None:
    """Raises UsageError if the recipe of a resumed run has changed in more than its epochs, evaluations or checkpoints."""
    before, after = (flat(r.model_dump(mode="json")) for r in (old, new))
    free = {"train.epochs", "evaluation.every", "trackers"}
    free |= {"checkpoint.every", "checkpoint.minutes", "checkpoint.keep"}
    schedules = {"objective.beta.anneal": "none", "train.learning_rate_schedule": "constant"}
    followers = [key for key, fixed in schedules.items() if after.get(key, fixed) != fixed]
    if followers:
        free.remove("train.epochs")
    changed = [
        key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key) and key not in free
    ]
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)!r} then, {after.get(key)!r} now" for key in changed)
        why = f" ({' and '.join(followers)} would follow them)" if followers and "train.epochs" in changed else ""
        raise UsageError(f"--resume: {path} was started with another recipe: {shown}{why}")


def plan_memory(config: Recipe) -> None:
    """Print the memory that the recipe will need. Raises UsageError if it exceeds `memory.budget_gib`."""
    from dag.costs import forecast

    for line in forecast.describe(config):
        print(line, flush=True)
    forecast.check_budget(config)


def check_memory(config: Recipe) -> None:
    """Raises UsageError if the recipe will need more than its `memory.budget_gib`."""
    if config.memory.budget_gib is not None:
        from dag.costs import forecast

        forecast.check_budget(config)


def train(config: Recipe, arguments: argparse.Namespace) -> None:
    """Open the run's folder and train in it."""
    opener = partial(open_run, arguments, config)
    # A single process opens the folder first, so that a mistake is reported at once. Several processes must be connected
    # before the main one makes the folder.
    opened = opener() if NUM_PROCESSES == 1 else None
    # Not at the top: this import takes seconds, and neither --plan nor the report of a mistake needs it.
    from dag.training import launch

    launch.train(config, lambda: opened or opener())


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each epoch as soon as it ends
    try:
        config = load(arguments.recipe, arguments.set)
        if arguments.plan:
            counts = len(prompts.load_prompts(config.prompts).training), len(captions.given_pictures(config))
            print(plan.describe(config, *counts), flush=True)
            plan_memory(config)
            return 0
        prompts.load_prompts(config.prompts)
        captions.given_pictures(config)
        check_memory(config)
        train(config, arguments)
    except (UsageError, RunError, StoppedError) as error:
        return exit_code(error)
    except KeyboardInterrupt:
        print("interrupted before training began", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(quiet_on_broken_pipe(main))
