"""Write a first recipe that fits: `python -m dag.new --model ID --gpu-memory GiB --reward NAME --prompts SET [--out FILE]`.

On a terminal what is not given is asked. No network is used, and no file is overwritten.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dag.errors import UsageError, exit_code, quiet_on_broken_pipe

_QUESTIONS = {
    "model": "Model (`embedded`, a diffusers folder or a hub id of Stable Diffusion 1.x to 3.5, SDXL or FLUX.1)",
    "gpu_memory": "Memory of the GPU in GiB (0: no GPU, for `embedded` alone)",
    "reward": "Reward (a name such as aesthetic, or file.py:function)",
    "prompts": "Prompts (a file with one a line, or a set such as simple_animals)",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dag.new", description="Write a recipe that fits your GPU.")
    parser.add_argument("--model", help="`embedded`, a local diffusers folder or a hub id")
    parser.add_argument("--gpu-memory", type=float, metavar="GiB", help="memory of the GPU; 0 for a CPU")
    parser.add_argument("--reward", metavar="NAME", help="a reward's name, file.py:function, or a server's http://...")
    parser.add_argument("--prompts", metavar="FILE", help="a file with one prompt a line, or the name of a prompt set")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: <reward>_<GiB>gb.yaml here")
    given = parser.parse_args(argv)
    missing = [f"--{key.replace('_', '-')}" for key in _QUESTIONS if getattr(given, key) is None]
    if missing and not sys.stdin.isatty():
        parser.error(f"missing: {', '.join(missing)} (on a terminal they are asked)")
    return given


def ask(given: argparse.Namespace) -> None:
    """Ask for what the command line does not say. An empty answer takes the value in brackets."""
    defaults = {"model": "embedded", "gpu_memory": _memory(), "reward": "aesthetic", "prompts": "simple_animals"}
    for key, question in _QUESTIONS.items():
        if getattr(given, key) is None:
            is_small = key == "reward" and given.model.startswith("embedded")
            default = "colourfulness" if is_small else defaults[key]
            setattr(given, key, input(f"{question} [{default}]: ").strip() or default)
    try:
        given.gpu_memory = float(given.gpu_memory)
    except ValueError:
        raise UsageError(f"--gpu-memory {given.gpu_memory}: a number of GiB is needed") from None


def _memory() -> str:
    """The memory of this machine's GPU in GiB; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return "0"
    return f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}"


def write(given: argparse.Namespace) -> None:
    """Write the recipe, and print what was chosen and how to go on. Raises UsageError."""
    # Not at the top: these take seconds, and --help and the questions need none of them.
    from dag.costs import starting

    if not 0 <= given.gpu_memory < 10_000:
        raise UsageError(f"--gpu-memory {given.gpu_memory:g}: a number of GiB is needed")
    name = Path(given.reward).name.rpartition(":")[2] if "//" not in given.reward else "http"
    size = f"{given.gpu_memory:g}gb" if given.gpu_memory else "cpu"
    out = given.out or Path(f"{name}_{size}.yaml")
    if os.path.lexists(out):
        raise UsageError(f"--out {out}: exists already; choose another name")
    wish = starting.Wish(given.model, given.gpu_memory, given.reward, given.prompts)
    made = starting.start(wish, out)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(made.text)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written: {error.strerror}") from None
    print("\n".join([f"{out}: written from {made.base.name}", *starting.told(made, out)]))


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_arguments(argv)
    try:
        ask(given)
        write(given)
    except UsageError as error:
        return exit_code(error)
    except (KeyboardInterrupt, EOFError):
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(quiet_on_broken_pipe(main))
