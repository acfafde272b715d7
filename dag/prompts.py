"""Prompts: named sets, text and JSONL files, and which prompt an epoch's trajectories get."""

import json
from pathlib import Path

import numpy as np

from dag.errors import UsageError
from dag.recipe import Prompts

# The 45 common animals that DDPO (Black et al. 2024, appendix) and DAG train on.
SIMPLE_ANIMALS = [
    "cat",
    "dog",
    "horse",
    "monkey",
    "rabbit",
    "zebra",
    "spider",
    "bird",
    "sheep",
    "deer",
    "cow",
    "goat",
    "lion",
    "tiger",
    "bear",
    "raccoon",
    "fox",
    "wolf",
    "lizard",
    "beetle",
    "ant",
    "butterfly",
    "fish",
    "shark",
    "whale",
    "dolphin",
    "squirrel",
    "mouse",
    "rat",
    "snake",
    "turtle",
    "frog",
    "chicken",
    "duck",
    "goose",
    "bee",
    "pig",
    "turkey",
    "fly",
    "llama",
    "camel",
    "bat",
    "gorilla",
    "hedgehog",
    "kangaroo",
]


def with_article(noun: str) -> str:
    """'cat' -> 'a cat', 'ant' -> 'an ant'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


SETS = {"simple_animals": tuple(map(with_article, SIMPLE_ANIMALS))}


def load_prompts(prompts: Prompts) -> tuple[str, ...]:
    """The prompts of a recipe, in order. Raises UsageError if a file is missing, unreadable or empty."""
    if prompts.set is not None:
        return SETS[prompts.set]
    if prompts.texts is not None:
        return prompts.texts
    assert prompts.file is not None
    return read_prompt_file(prompts.file)


def read_prompt_file(path: str | Path) -> tuple[str, ...]:
    """One prompt a line, or one JSON object with a `prompt` key a line if the name ends in .jsonl."""
    try:
        # Not splitlines, which also cuts inside prompts: at form feeds, at U+2028.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UsageError(f"prompts.file: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"prompts.file: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    is_jsonl = str(path).endswith(".jsonl")
    found = tuple(_prompt_of_json(path, number, line) if is_jsonl else line for number, line in numbered)
    if not found:
        raise UsageError(f"prompts.file: {path} holds no prompt")
    return found


def _prompt_of_json(path: str | Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(
            f'prompts.file: {path}, line {number}: expected {{"prompt": "some text"}}, found {line[:60]!r}'
        )
    return prompt


def draw(num_prompts: int, count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) int64 prompt indices of an epoch: whole shuffled rounds of the set, so counts differ by at most one.

    A function of (seed, epoch) alone, hence the same after a restart.
    """
    generator = np.random.default_rng([seed, epoch])
    rounds = [generator.permutation(num_prompts) for _ in range(-(-count // num_prompts))]
    return np.concatenate(rounds)[:count].astype(np.int64)
