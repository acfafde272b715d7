"""A folder of pictures with their prompts, in the layout of the datasets library's imagefolder. Imports no torch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dag.errors import UsageError
from dag.recipe import Recipe

CAPTIONS = ("metadata.jsonl", "captions.jsonl")
"""The files in which prompts are looked for, the first that exists."""


@dataclass(frozen=True)
class Captioned:
    """A picture and its prompt."""

    file: Path
    text: str


def load_captions(folder: str | Path) -> tuple[Captioned, ...]:
    """The pictures of a folder, in the order of its captions file. Pictures without a line there are ignored.

    Raises UsageError if there is no captions file, or a line of it is no picture in the folder with its prompt.
    """
    path = next(filter(Path.is_file, (Path(folder) / name for name in CAPTIONS)), None)
    if path is None:
        raise UsageError(f"data.folder: {folder} has no {' or '.join(CAPTIONS)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"data.folder: cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        ) from None
    found = tuple(_captioned(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not found:
        raise UsageError(f"data.folder: {path} names no picture")
    return found


def _captioned(path: Path, number: int, line: str) -> Captioned:
    try:
        row = json.loads(line)
        name, text = row["file_name"], row["text"]
    except (ValueError, LookupError, TypeError, RecursionError):
        name = text = None
    where = f"data.folder: {path}, line {number}"
    if not (isinstance(name, str) and isinstance(text, str) and text.strip()):
        raise UsageError(f'{where}: expected {{"file_name": "0.png", "text": "some text"}}, found {line[:60]!r}')
    file = path.parent / name
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise UsageError(f"{where}: {name!r} is outside of the folder")
    if not file.is_file():
        raise UsageError(f"{where}: {name!r} is no file in the folder")
    return Captioned(file, text.strip())


def given_pictures(recipe: Recipe) -> tuple[Captioned, ...]:
    """The pictures of `data.folder`; none without one. Raises UsageError if they cannot be read, or do not fill groups."""
    folder, per_group = recipe.data.folder, recipe.prompts.per_group
    if folder is None:
        return ()
    pictures = load_captions(folder)
    for text, numbers in _by_text(pictures).items():
        if len(numbers) < per_group:
            raise UsageError(
                f"data.folder: {folder} has {len(numbers)} of {text!r}; prompts.per_group={per_group} compares so many of a prompt"
            )
    return pictures


def draw(pictures: Sequence[Captioned], count: int, seed: int, epoch: int, per_group: int = 1) -> np.ndarray:
    """(count,) int64 numbers of the pictures that an epoch trains on, in groups of different pictures of one prompt.

    They are shuffled rounds through the folder; what does not fill a group waits for another round. They depend on (seed, epoch)
    alone.
    """
    generator, drawn, of_prompts = np.random.default_rng([seed, epoch]), list[np.ndarray](), _by_text(pictures).values()
    while len(drawn) * per_group < count:
        shuffled = [generator.permutation(numbers) for numbers in of_prompts]
        groups = [
            numbers[start : start + per_group]
            for numbers in shuffled
            for start in range(0, len(numbers) - per_group + 1, per_group)
        ]
        drawn += [groups[number] for number in generator.permutation(len(groups))]
    return np.concatenate(drawn)[:count].astype(np.int64)


def fingerprint(pictures: Sequence[Captioned]) -> str:
    """Fingerprint of the prompts, and of the pictures' files, in their order."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(f"{picture.text}\0{hashlib.sha256(picture.file.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()[:16]


def _by_text(pictures: Sequence[Captioned]) -> dict[str, list[int]]:
    """The numbers of the pictures of each prompt."""
    found: dict[str, list[int]] = {}
    for number, picture in enumerate(pictures):
        found.setdefault(picture.text, []).append(number)
    return found
