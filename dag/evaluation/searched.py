"""The folder of a search (`python -m dag.search`): what was searched, and the pictures that were found.

It holds:

    search.json                         the recipe, versions and machine
    pictures/NNNN.png                   what was found for a prompt: its pictures side by side, 8 bits a channel
    pictures/NNNN.json                  their rewards and work; written last
    plain/NNNN.png                      the same without a search, from the noise with which the search began
    results.json, before_after.png      all prompts
    metadata.jsonl, found/NNNN_M.png    each picture by itself, with its prompt and reward: a folder for `data.folder`
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dag.errors import UsageError
from dag.recipe.load import checked
from dag.recipe.prompts import load_prompts
from dag.recipe.search_sections import SearchRecipe


class SearchFolder:
    """The paths in a search's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description, self.results = path / "search.json", path / "results.json"
        self.metadata = path / "metadata.jsonl"

    def record(self, number: int) -> Path:
        """The file with the numbers of a prompt."""
        return self.path / "pictures" / f"{number:04d}.json"

    def pictures(self, kind: str, number: int) -> Path:
        """The file with the pictures of a prompt; `kind` is "pictures" or "plain"."""
        return self.path / kind / f"{number:04d}.png"

    def single(self, number: int, picture: int) -> Path:
        """The file of one picture that was found for a prompt."""
        return self.path / "found" / f"{number:04d}_{picture}.png"

    def is_one(self) -> bool:
        """Whether there is a search in the folder."""
        return self.description.is_file()

    def read_recipe(self) -> SearchRecipe:
        """The recipe of the search. Raises UsageError if search.json holds none that this version understands."""
        return checked(SearchRecipe, self._described("recipe"), str(self.description))

    def read_steered(self) -> str | None:
        """The fingerprint of the trained weights that were steered; None for the base model. Raises UsageError."""
        return self._described("steered")

    def _described(self, key: str) -> Any:
        try:
            return json.loads(self.description.read_text(encoding="utf-8"))[key]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"{self.description}: cannot be read: {error}") from None

    def read_results(self) -> dict[str, Any]:
        """The results of all prompts. Raises UsageError if the search has not ended."""
        try:
            return json.loads(self.results.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UsageError(f"{self.path}: the search has not ended; the command that began it goes on") from None

    def found(self, prompts: Sequence[str], count: int) -> Tensor:
        """(P * count, 3, H, W) in [0, 1], the first `count` pictures of each prompt. Raises UsageError if there are not so many."""
        recipe = self.read_recipe()
        known = {prompt: number for number, prompt in enumerate(load_prompts(recipe.prompts).training)}
        unknown = [prompt for prompt in prompts if prompt not in known]
        if unknown:
            raise UsageError(f"--against {self.path}: has no pictures of {unknown[0]!r}")
        if recipe.images < count:
            raise UsageError(
                f"--against {self.path}: has {recipe.images} pictures a prompt; use --images {recipe.images}"
            )
        files = [self.pictures("pictures", known[prompt]) for prompt in prompts]
        return torch.cat([side_by_side(file, recipe.images)[:count] for file in files])


def side_by_side(file: Path, count: int) -> Tensor:
    """(count, 3, H, W) in [0, 1], the pictures in a file."""
    pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
    return torch.stack(pixels.permute(2, 0, 1).float().div(255).chunk(count, dim=2))
