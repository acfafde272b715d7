"""Draw with a trained model: `python -m dag.sample --run RUN [--prompt TEXT ...] [--images N] [--seed S] [--out FILE]`.

Writes one picture: a grid from the base model on the left and one from the trained model on the right, with the same seeds.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dag.chain import sample_ids
from dag.chain.rollout import generate
from dag.errors import RunError, UsageError, exit_code, quiet_on_broken_pipe
from dag.evaluation import sheets
from dag.models import families
from dag.recipe import Memory
from dag.recipe.prompts import load_prompts
from dag.run import checkpoint
from dag.run.folder import RunFolder
from dag.run.gpu import out_of_memory_ends, this_device

_DEFAULT_PROMPTS = 8


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dag.sample", description="Pictures before and after training.")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--prompt", nargs="+", help="prompts; default: the first of the run's own")
    parser.add_argument("--images", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--seed", type=int, help="default: the run's")
    parser.add_argument("--checkpoint", help="name under checkpoints/; default: the newest")
    parser.add_argument("--out", type=Path, help="PNG file; default samples/sample_NNN.png in the run folder")
    return parser.parse_args(argv)


def draw(arguments: argparse.Namespace) -> Path:
    """Draw the picture and save it; returns its path."""
    run = RunFolder.open(arguments.run)
    recipe = run.read_recipe()
    if arguments.images < 1:
        raise UsageError(f"--images {arguments.images}: at least 1")
    out = arguments.out or _free_name(run.samples)
    if out.exists():
        raise UsageError(f"--out {out}: exists already; choose another name")
    prompts = list(arguments.prompt or load_prompts(recipe.prompts).training[:_DEFAULT_PROMPTS])
    weights = checkpoint.load_tensors(checkpoint.chosen(run.checkpoints, arguments.checkpoint), "policy")
    device = this_device()
    policy = families.load(recipe.model_copy(update={"memory": Memory()}), device)
    for warning in policy.prompt_warnings(prompts):
        print(f"warning: {warning}", file=sys.stderr)
    captions = [prompt for prompt in prompts for _ in range(arguments.images)]
    text = policy.encode(prompts).repeat_interleave(arguments.images, dim=0)
    sample_id = sample_ids.SAMPLES + torch.arange(len(captions))
    seed = recipe.seed if arguments.seed is None else arguments.seed
    before = generate(policy, text, sample_id, seed, recipe.sampler)
    policy.load_state_dict(weights)
    after = generate(policy, text, sample_id, seed, recipe.sampler)
    out.parent.mkdir(parents=True, exist_ok=True)
    grids = [sheets.grid(images, captions, arguments.images) for images in (before, after)]
    sheets.before_after(*grids).save(out)
    return out


def _free_name(folder: Path) -> Path:
    """The first of sample_000.png, sample_001.png, ... that does not exist in `folder`."""
    number = 0
    while (folder / f"sample_{number:03d}.png").exists():
        number += 1
    return folder / f"sample_{number:03d}.png"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        with out_of_memory_ends("out of GPU memory while drawing; nothing was written"):
            print(draw(arguments))
    except (UsageError, RunError) as error:
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(quiet_on_broken_pipe(main))
