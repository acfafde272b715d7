"""Judge trained models by their pictures: `python -m dag.evaluate --run RUN [--against RUN2 ...] [--out DIR]`.

Writes evaluation.json, evaluation.md and pictures.png; with searches among them also equal_cost.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dag.errors import RunError, UsageError, exit_code, quiet_on_broken_pipe
from dag.evaluation import verdict
from dag.evaluation.compare import evaluate
from dag.evaluation.perceptual import DISTANCES
from dag.evaluation.searched import SearchFolder
from dag.recipe import RewardTerm
from dag.recipe.load import parse_reward
from dag.recipe.prompts import read_prompt_file
from dag.run.folder import RunFolder
from dag.run.gpu import out_of_memory_ends, this_device
from dag.training.plan import training_passes


def _free(folder: Path) -> Path:
    """The first of evaluation, evaluation_001, ... that does not exist in `folder`."""
    number, path = 0, folder / "evaluation"
    while path.exists():
        number += 1
        path = folder / f"evaluation_{number:03d}"
    return path


def _terms(given: Sequence[str]) -> list[RewardTerm]:
    """The rewards that `--reward` names, each as `name` or `name,key=value,...`."""
    return [parse_reward(name, options) for name, *options in (text.split(",") for text in given)]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dag.evaluate", description="Judge trained models by their pictures."
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="RUN", help="more runs or searches, same base model"
    )
    parser.add_argument("--prompts", type=int, default=16, metavar="N", help="how many of the run's prompts")
    parser.add_argument("--prompt-file", metavar="FILE", help="prompts of your own instead")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="pictures per prompt")
    parser.add_argument(
        "--reward", action="append", default=[], metavar="NAME[,key=value...]", help="one more reward, as in a recipe"
    )
    parser.add_argument("--features", metavar="MODEL", help="`embedded`, or a CLIP model: a folder or hub id")
    parser.add_argument(
        "--distance",
        action="append",
        default=[],
        choices=list(DISTANCES),
        help="a perceptual distance within prompts too",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: evaluation/ in the run folder")
    return parser.parse_args(argv)


def _leave_no_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_arguments(argv)
    device = this_device()
    out = given.out or _free(given.run)
    try:
        RunFolder.open(given.run)
        for run in given.against:
            if not SearchFolder(run).is_one():
                RunFolder.open(run)
        try:
            out.mkdir(parents=True, exist_ok=True)
            is_empty = not any(out.iterdir())
        except OSError as error:
            raise UsageError(f"--out {out}: cannot write there: {error.strerror}") from None
        if not is_empty:
            raise UsageError(f"--out {out}: the folder is not empty; choose another")
        own = read_prompt_file(given.prompt_file, "--prompt-file") if given.prompt_file else None
        with out_of_memory_ends("out of GPU memory while judging; nothing was written"):
            data, drawn = evaluate(
                [given.run, *given.against],
                device,
                own,
                given.prompts,
                given.images,
                _terms(given.reward),
                given.features,
                given.distance,
                training_passes,
            )
        verdict.write(out, data, drawn)
    except (UsageError, RunError) as error:
        _leave_no_empty(out)
        return exit_code(error)
    except KeyboardInterrupt:
        _leave_no_empty(out)
        print("interrupted", file=sys.stderr)
        return 130
    print(verdict.table(data))
    print(json.dumps({"written": str(out)}))
    return 0


if __name__ == "__main__":
    sys.exit(quiet_on_broken_pipe(main))
