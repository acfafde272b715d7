"""The prompts of a recipe, from a named set, a file or the recipe itself, and which of them an epoch samples."""

import json
from pathlib import Path

import numpy as np

from dag.errors import UsageError
from dag.recipe import Prompts, prompt_sets
from dag.recipe.prompt_sets import PromptSet


def load_prompts(prompts: Prompts) -> PromptSet:
    """The prompts of a recipe, in order. Raises UsageError if a file is missing, unreadable or empty."""
    if prompts.set is not None:
        return prompt_sets.named(prompts.set, prompts.path, prompts.style)
    if prompts.texts is not None:
        return PromptSet(prompts.texts)
    assert prompts.file is not None
    return PromptSet(read_prompt_file(prompts.file))


def read_prompt_file(path: str | Path, key: str = "prompts.file") -> tuple[str, ...]:
    """The prompts of a UTF-8 file: one a line, or, if the name ends in .jsonl, one JSON object with a `prompt` key a line.

    Raises UsageError, which names the recipe key `key`, if the file cannot be read or holds no prompt.
    """
    try:
        # Not splitlines: it would also cut prompts at form feeds and at U+2028.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UsageError(f"{key}: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{key}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    is_jsonl = str(path).endswith(".jsonl")
    found = tuple(_prompt_of_json(key, path, number, line) if is_jsonl else line for number, line in numbered)
    if not found:
        raise UsageError(f"{key}: {path} holds no prompt")
    return found


def _prompt_of_json(key: str, path: str | Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f'{key}: {path}, line {number}: expected {{"prompt": "some text"}}, found {line[:60]!r}')
    return prompt


def draw(num_prompts: int, count: int, seed: int, epoch: int, per_group: int = 1) -> np.ndarray:
    """(count,) int64 indices of the prompts that an epoch samples.

    They are shuffled rounds through the set, each prompt `per_group` times in a row, so no prompt has more than one group more
    than another. They depend on (seed, epoch) alone, hence are the same after a restart.
    """
    generator = np.random.default_rng([seed, epoch])
    rounds = [generator.permutation(num_prompts) for _ in range(-(-count // (num_prompts * per_group)))]
    return np.concatenate(rounds).repeat(per_group)[:count].astype(np.int64)
