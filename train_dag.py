"""Align a text-to-image diffusion model with a reward.

    accelerate launch train_dag.py --recipe recipes/tiny_cpu.yaml

Algorithm 1 of Zhang et al. (2025), as `dag.trainer.Trainer.fit` runs it:

    for each epoch:
        roll out P_F: chains x_T .. x_0, each state's x0_hat scored as it is visited     dag/rollout.py
        residual(log F, log P_F, log P_B, log F') of every transition                    dag/balance.py
        its square (DAG-DB) or its score-function gradient (DAG-KL) moves P_F and F      dag/objectives/
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dag import plan, prompts
from dag.errors import RunError, UsageError, exit_code
from dag.recipe import Recipe
from dag.recipe_file import load
from dag.run_folder import RunFolder, default_path, newest_run


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


def open_run(arguments: argparse.Namespace, config: Recipe) -> tuple[RunFolder, Path | None]:
    """(run folder, checkpoint to resume from or None)."""
    name = Path(arguments.recipe).stem
    if arguments.resume is None:
        return RunFolder.create(Path(arguments.out) if arguments.out else default_path(name)), None
    run = RunFolder.open(Path(arguments.resume or arguments.out or newest_run(name)))
    _check_same_recipe(run.read_recipe(), config, run.path)
    last = run.checkpoints / "last"
    if not last.exists():
        raise UsageError(f"--resume: {run.path} has no checkpoint yet; start it again in another folder")
    return run, last.resolve()


def _check_same_recipe(old: Recipe, new: Recipe, path: Path) -> None:
    """A resumed run may train for more epochs and report more often; anything else would be another run."""
    before, after = (_flat(r.model_dump(mode="json")) for r in (old, new))
    free = {"train.epochs", "evaluation.every", "checkpoint.every", "checkpoint.keep", "trackers"}
    if after.get("objective.beta.anneal", "none") != "none":
        free.remove("train.epochs")  # beta's schedule depends on the number of epochs
    changed = [
        key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key) and key not in free
    ]
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)!r} then, {after.get(key)!r} now" for key in changed)
        raise UsageError(f"--resume: {path} was started with another recipe: {shown}")


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    return {
        key: value for name, part in data.items() for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }


def plan_memory(config: Recipe) -> None:
    """What the recipe will need, and whether that is within its budget."""
    from dag import forecast

    for line in forecast.describe(config):
        print(line, flush=True)
    forecast.check_budget(config)


def check_memory(config: Recipe) -> None:
    """Refuse a recipe beyond its budget, and hold the GPU's allocator to it."""
    budget = config.memory.budget_gib
    if budget is None:
        return
    import torch

    from dag import forecast

    forecast.check_budget(config)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget * forecast.GIB / total))


def train(config: Recipe, run: RunFolder, resume_from: Path | None) -> None:
    # Here, not above: these imports take seconds, and --plan and mistakes need none of them.
    import torch
    from accelerate import Accelerator

    from dag.parts import build, describe_run
    from dag.trainer import Trainer

    accelerator = Accelerator(mixed_precision="no", log_with=list(config.trackers) or None, project_dir=str(run.path))
    if accelerator.num_processes > 1:
        raise UsageError(
            f"launched with {accelerator.num_processes} processes; this version trains in one: accelerate launch --num_processes 1"
        )
    _use_all_threads(accelerator.device.type)
    parts = build(config, accelerator.device)
    print(f"kernels: {parts.kernels.name} ({parts.kernels.reason})")
    print(f"attention: {parts.policy.describe()['attention']}", flush=True)
    if resume_from is not None:
        # With what may change on the way: more epochs, other reports.
        run.write_description({**run.read_description(), "recipe": config.model_dump(mode="json")})
    else:
        run.write_description(describe_run(config, parts, accelerator.device))
    tracker = None
    if config.trackers:
        accelerator.init_trackers(
            "dag", config={key: str(value) for key, value in _flat(config.model_dump(mode="json")).items()}
        )
        tracker = accelerator.log
    try:
        Trainer(config, run, parts, tracker).fit(resume_from)
    except torch.OutOfMemoryError as error:
        first = str(error).partition("\n")[0]
        raise RunError(f"out of GPU memory outside sampling and gradients: {first}") from None
    accelerator.end_training()


def _use_all_threads(device_type: str) -> None:
    """Undo the launcher's OMP_NUM_THREADS=1, which it sets for any number of CPU processes, also for one."""
    import torch

    is_launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if device_type == "cpu" and is_launched and torch.get_num_threads() == 1:
        threads = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        print(
            f"{threads} threads (accelerate's launcher had set 1; start with python train_dag.py to choose)", flush=True
        )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    # At import these say which optional packages are missing, which concerns nobody here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        config = load(arguments.recipe, arguments.set)
        if arguments.plan:
            print(plan.describe(config, len(prompts.load_prompts(config.prompts).training)), flush=True)
            plan_memory(config)
            return 0
        prompts.load_prompts(config.prompts)
        check_memory(config)
        run, resume_from = open_run(arguments, config)
        print(f"run folder {run.path}", flush=True)
        train(config, run, resume_from)
    except (UsageError, RunError) as error:
        return exit_code(error)
    except KeyboardInterrupt:
        print("interrupted; continue from the last checkpoint with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
