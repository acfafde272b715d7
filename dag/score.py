"""Score pictures with any reward of a recipe, or check a reward of your own.

    python -m dag.score --check my_reward.py:redness
    python -m dag.score --reward aesthetic a.png b.jpg
    python -m dag.score --reward pickscore --prompts prompts.txt --set path=/models/PickScore_v1 *.png

`--prompts` is a text file (or .jsonl) with one prompt for all pictures or one for each, in their order. A table comes
first, one line of JSON last. A picture that cannot be read is reported and skipped; the exit code is 1 if none could
be read, 2 for a mistake in the command. `--check` asks a reward about a few made-up pictures and prints a line for each part
of its contract; the exit code is 1 if it breaks one.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dag.errors import RunError, UsageError, exit_code, quiet_on_broken_pipe
from dag.recipe.load import parse_reward
from dag.recipe.prompts import read_prompt_file
from dag.rewards import Reward, build_reward, checked
from dag.rewards.contract import contract
from dag.run.gpu import out_of_memory_ends


@dataclass(frozen=True)
class Scored:
    """A picture's file, its prompt, and either its score or the reason why it could not be read."""

    image: str
    prompt: str
    score: float | None = None
    error: str | None = None


def read_image(path: str) -> Tensor:
    """Read a picture as (1, 3, H, W) float32 in [0, 1]. Raises what Pillow raises if the file is no picture."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def score_files(name: str, reward: Reward, images: Sequence[str], prompts: Sequence[str]) -> Iterator[Scored]:
    """Yield one result for each file, in order; pictures are scored one by one, since they may differ in size.

    Args:
        prompts: one for each picture.
    """
    for path, prompt in zip(images, prompts, strict=True):
        try:
            picture = read_image(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            yield Scored(path, prompt, error=reason)
            continue
        yield Scored(path, prompt, score=float(checked(name, reward, picture, [prompt])))


def prompts_for(images: Sequence[str], file: str | None) -> list[str]:
    """One prompt for each picture, from a prompt file; "" without a file. Raises UsageError if the number is wrong."""
    if file is None:
        return [""] * len(images)
    found = read_prompt_file(file, "--prompts")
    if len(found) not in (1, len(images)):
        raise UsageError(f"--prompts: {file} holds {len(found)} prompts for {len(images)} images; give one or as many")
    return list(found) * (len(images) if len(found) == 1 else 1)


def table(results: Sequence[Scored]) -> str:
    """A table to print: a line with score, file name and prompt for each picture."""
    width = max(len(Path(result.image).name) for result in results)
    lines = []
    for result in results:
        shown = "skipped" if result.score is None else f"{result.score:.4f}"
        remark = result.error if result.score is None else result.prompt
        lines.append(f"{shown:>10}  {Path(result.image).name:<{width}}  {remark}".rstrip())
    return "\n".join(lines)


def check(given: argparse.Namespace) -> int:
    """Print a line for each part of a reward's contract; returns the exit code. Raises UsageError if there is no such reward."""
    is_own = ":" in given.check
    term = parse_reward("custom" if is_own else given.check, [f"path={given.check}"] if is_own else given.set)
    with out_of_memory_ends("out of GPU memory while checking; --device cpu needs none"):
        broken = 0
        for line in contract(build_reward(term, torch.device(given.device)), torch.device(given.device)):
            print(f"{'ok' if line.is_kept else 'FAILED':<8}{line.title:<12}{line.found}", flush=True)
            broken += not line.is_kept
    print(f"{given.check}: {f'{broken} of its checks failed' if broken else 'keeps the contract of a reward'}")
    return 1 if broken else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dag.score", description="Score pictures with a reward, or check a reward."
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="picture files")
    parser.add_argument("--reward", metavar="NAME", help="as in a recipe, e.g. aesthetic")
    parser.add_argument("--check", metavar="FILE.py:FUNCTION", help="check a reward of yours, or one by name")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="option of the reward")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt for all pictures, or one for each")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU if there is one"
    )
    given = parser.parse_args(arguments)
    if given.check is None and not (given.reward and given.images):
        parser.error("give --reward NAME and pictures, or --check FILE.py:FUNCTION")
    if given.check is not None and (given.reward or given.images or given.prompts):
        parser.error("--check makes its own pictures and prompts; give no others, and no --reward")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse_arguments(arguments)
    try:
        if given.check is not None:
            return check(given)
        prompts = prompts_for(given.images, given.prompts)
        term = parse_reward(given.reward, given.set)
        with out_of_memory_ends("out of GPU memory while scoring; --device cpu needs none"):
            reward = build_reward(term, torch.device(given.device))
            progress = tqdm(score_files(term.name, reward, given.images, prompts), total=len(prompts), disable=None)
            results = list(progress)
    except (RunError, UsageError) as error:
        return exit_code(error)
    for result in results:
        if result.error is not None:
            print(f"{result.image}: skipped: {result.error}", file=sys.stderr)
    print(table(results))
    print(json.dumps({"reward": term.name, "images": [vars(result) for result in results]}))
    return 0 if any(result.score is not None for result in results) else 1


if __name__ == "__main__":
    sys.exit(quiet_on_broken_pipe(main))
