"""Search for better pictures without training: `python -m dag.search --recipe FILE [--method NAME] [--lora RUN] [--out DIR]`.

    best_of_n   n pictures, of which the best is kept
    fk          Feynman-Kac steering: particles that are weighted by the rewards of their previews, and resampled
    svdd        several next states in each step, of which one is chosen; with beams and fewer proposals DSearch
    reno        gradient ascent on the first noise

The recipe is one of recipes/search/, or a training recipe, whose model, sampler, prompts and reward are taken. The same command
goes on after an interruption, prompt by prompt. Writes pictures, results.json and before_after.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from dag.costs.memory import Simulation
from dag.errors import RunError, UsageError, exit_code, quiet_on_broken_pipe
from dag.recipe.load import load_search
from dag.recipe.search_sections import SEARCHES, SearchRecipe
from dag.run import checkpoint
from dag.run.folder import RunFolder, default_path
from dag.run.gpu import GIB, out_of_memory_ends, this_device
from dag.steering.runner import Searching


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dag.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, metavar="FILE", help="of a search, or of a training")
    parser.add_argument("--method", choices=SEARCHES, help="default: the recipe's")
    parser.add_argument("--prompt", nargs="+", help="prompts in place of the recipe's")
    parser.add_argument("--lora", type=Path, metavar="RUN", help="steer the trained model of this run folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<recipe>-<time>")
    parser.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="override a recipe key")
    return parser.parse_args(argv)


def recipe_of(given: argparse.Namespace) -> tuple[SearchRecipe, dict[str, Tensor] | None]:
    """(the recipe, the weights of the trained model that is steered). Raises UsageError, or RunError if there are no weights."""
    prompts = [f"prompts={json.dumps({'texts': given.prompt})}"] if given.prompt else []
    recipe = load_search(given.recipe, given.method, [*given.set, *prompts])
    if given.lora is None:
        return recipe, None
    run = RunFolder.open(given.lora)
    trained = run.read_recipe()
    if trained.model.path != recipe.model.path:
        raise UsageError(
            f"--lora {given.lora}: trained on {trained.model.path}, but the recipe has {recipe.model.path}"
        )
    weights = checkpoint.load_tensors(checkpoint.chosen(run.checkpoints), "policy")
    sampler = recipe.sampler.model_copy(update={"uncond": trained.sampler.uncond})
    return recipe.model_copy(update={"adapter": trained.adapter, "sampler": sampler}), weights


def check_budget(recipe: SearchRecipe) -> None:
    """Raises UsageError if sampling a tile is predicted to need more than `memory.budget_gib`."""
    budget = recipe.memory.budget_gib
    if budget is None:
        return
    peak = Simulation(recipe.as_training()).peak("evaluation") / GIB
    if peak > budget:
        raise UsageError(
            f"memory.budget_gib={budget:g}: a tile of {recipe.sampler.tile} particles is predicted to need {peak:.2f} GiB; "
            "use a smaller sampler.tile or memory.decode_batch"
        )


def run(given: argparse.Namespace) -> Path:
    """Search all prompts that have no pictures yet; returns the folder."""
    recipe, weights = recipe_of(given)
    check_budget(recipe)
    folder = given.out or default_path(f"search_{recipe.search.name}")
    searching = Searching(recipe, folder, this_device(), weights, warn=lambda line: print(line, file=sys.stderr))
    missing = searching.missing()
    if len(missing) < len(searching.prompts):
        print(f"{len(searching.prompts) - len(missing)} of {len(searching.prompts)} prompts are done already")
    for number in tqdm(missing, unit="prompt", disable=None):
        row = searching.search(number)
        plain, found = (sum(row[key]) / len(row[key]) for key in ("reward_plain", "reward"))
        tqdm.write(f"{row['prompt']}: {plain:.4g} -> {found:.4g}, {row['passes']:.0f} passes a picture")
    print(json.dumps({**searching.finish(), "written": str(folder)}))
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_arguments(argv)
    try:
        with out_of_memory_ends(
            "out of GPU memory while searching; use a smaller sampler.tile, and the same --out goes on"
        ):
            run(given)
    except (UsageError, RunError) as error:
        return exit_code(error)
    except KeyboardInterrupt:
        print("interrupted; the same command with --out goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(quiet_on_broken_pipe(main))
