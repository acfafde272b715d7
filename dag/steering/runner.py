"""Searches the pictures of a recipe's prompts, one after the other, into a folder from which an interrupted search goes on.

`dag.evaluation.searched` says what is in the folder.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from dag.chain.sample_ids import of_particles
from dag.errors import UsageError
from dag.evaluation import sheets
from dag.evaluation.searched import SearchFolder, side_by_side
from dag.models import families
from dag.recipe import ForwardLooking
from dag.recipe.prompts import load_prompts
from dag.recipe.search_sections import SearchRecipe
from dag.rewards import RewardSum
from dag.rewards.pixels import to_bytes
from dag.run import durable
from dag.run.fingerprint import of_weights
from dag.run.machine import describe_machine, git_commit
from dag.steering.feynman_kac import best_of_n, steer
from dag.steering.found import Found, Search
from dag.steering.noise import optimise_noise
from dag.steering.particles import Particles
from dag.steering.stepwise import choose_stepwise

METHODS: dict[str, Search] = {"best_of_n": best_of_n, "fk": steer, "svdd": choose_stepwise, "reno": optimise_noise}
"""The searches by `search.name`."""
# Pictures on the sheet that shows a search's results.
_SHOWN = 32


class Searching:
    """The search of a recipe's prompts.

    Args:
        folder:  gets the results.
        weights: the trained weights of a model that is steered; None for the base model.

    Raises:
        UsageError: the folder holds another search, or the recipe asks for what cannot be done.
        RunError:   the model or a reward cannot be loaded.
    """

    def __init__(
        self,
        recipe: SearchRecipe,
        folder: Path,
        device: torch.device,
        weights: dict[str, Tensor] | None = None,
        warn: Callable[[str], object] = print,
    ) -> None:
        self.recipe, self.folder = recipe, SearchFolder(folder)
        self.prompts = load_prompts(recipe.prompts).training
        self._claim(device, None if weights is None else of_weights(list(weights.values())))
        training = recipe.as_training()
        self.reward = RewardSum(training.reward, device)
        self.policy = families.load(training, device, ForwardLooking(decoder=recipe.preview_decoder))
        for warning in self.policy.prompt_warnings(self.prompts):
            warn(f"warning: {warning}")
        self.text = self.policy.encode(self.prompts)
        self.policy.free_text_encoder()
        if weights is not None:
            self.policy.load_state_dict(weights)

    def _claim(self, device: torch.device, steered: str | None) -> None:
        """Write what is searched into the folder, or check that it is the same search. Raises UsageError."""
        folder, recipe = self.folder, self.recipe.model_dump(mode="json")
        try:
            for kind in ("pictures", "plain"):
                (folder.path / kind).mkdir(parents=True, exist_ok=True)
            if not folder.is_one():
                described = {"recipe": recipe, "steered": steered, **describe_machine(device), "commit": git_commit()}
                durable.write_json(folder.description, described)
        except OSError as error:
            raise UsageError(f"--out {folder.path}: cannot be used: {error.strerror}") from None
        if folder.read_recipe() != self.recipe or folder.read_steered() != steered:
            raise UsageError(f"--out {folder.path}: holds another search; choose another folder")

    def missing(self) -> list[int]:
        """The numbers of the prompts that have no pictures yet."""
        return [number for number in range(len(self.prompts)) if not self.folder.record(number).exists()]

    def search(self, number: int) -> dict[str, Any]:
        """Search the pictures of a prompt, and write them. Returns what was written about them."""
        particles = Particles(
            self.policy,
            self.reward,
            self.recipe.sampler,
            self.recipe.seed,
            self.text[number : number + 1],
            self.prompts[number],
            self.recipe.sampler.tile,
        )
        with self.reward.at_work(), self.policy.decoder.at_work():
            plain = [self._plain(particles, picture) for picture in self._numbers(number)]
            passes, scored, began = particles.work.passes, particles.work.scored, time.monotonic()
            found = [self._found(particles, picture) for picture in self._numbers(number)]
        seconds = time.monotonic() - began
        row = {
            "prompt": self.prompts[number],
            "reward_plain": [one.reward for one in plain],
            "reward": [one.reward for one in found],
            "passes": (particles.work.passes - passes) / len(found),
            "scored": (particles.work.scored - scored) / len(found),
            "seconds": seconds / len(found),
            "details": [one.details for one in found],
        }
        self._write("plain", number, [one.image for one in plain])
        self._write("pictures", number, [one.image for one in found])
        durable.write_json(self.folder.record(number), row)
        return row

    def finish(self) -> dict[str, Any]:
        """Write the results of all prompts, and return their means."""
        files = [self.folder.record(number) for number in range(len(self.prompts))]
        rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        means = {key: _mean(rows, key) for key in ("reward_plain", "reward", "passes", "scored", "seconds")}
        durable.write_json(self.folder.results, {"method": self.recipe.search.name, **means, "prompts": rows})
        self._draw(rows)
        self._write_as_data(rows)
        return means

    def _write_as_data(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write what was found as a folder of pictures with prompts, which `data.folder` and the datasets library read."""
        lines = []
        for number, row in enumerate(rows):
            pictures = to_bytes(side_by_side(self.folder.pictures("pictures", number), self.recipe.images))
            for picture, (pixels, reward) in enumerate(zip(pictures, row["reward"], strict=True)):
                file = self.folder.single(number, picture)
                file.parent.mkdir(exist_ok=True)
                with durable.replacing(file) as temporary:
                    Image.fromarray(pixels).save(temporary)
                name = file.relative_to(self.folder.path).as_posix()
                lines.append(json.dumps({"file_name": name, "text": row["prompt"], "reward": reward}) + "\n")
        with durable.replacing(self.folder.metadata) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def _found(self, particles: Particles, picture: int) -> Found:
        """One picture. Its choices depend on the seed and its place alone, so that a search goes on as if undisturbed."""
        generator = Generator().manual_seed(self.recipe.seed * 1_000_003 + picture)
        return METHODS[self.recipe.search.name](self.recipe, particles, partial(of_particles, picture), generator)

    def _plain(self, particles: Particles, picture: int) -> Found:
        ends = particles.drawn(of_particles(picture, 1))
        return Found(ends.images[0], float(ends.reward))

    def _numbers(self, number: int) -> range:
        """The numbers of a prompt's pictures, counted through all prompts."""
        return range(number * self.recipe.images, (number + 1) * self.recipe.images)

    def _write(self, kind: str, number: int, images: Sequence[Tensor]) -> None:
        with durable.replacing(self.folder.pictures(kind, number)) as temporary:
            Image.fromarray(np.concatenate(list(to_bytes(torch.stack(list(images)))), axis=1)).save(temporary)

    def _draw(self, rows: Sequence[dict[str, Any]]) -> None:
        """Draw the first pictures before and after, side by side."""
        images, grids = self.recipe.images, []
        shown = range(min(len(rows), max(1, _SHOWN // images)))
        for kind, key in (("plain", "reward_plain"), ("pictures", "reward")):
            pictures = torch.cat([side_by_side(self.folder.pictures(kind, number), images) for number in shown])
            captions = [f"{rows[number]['prompt']}  {reward:.2f}" for number in shown for reward in rows[number][key]]
            grids.append(sheets.grid(pictures, captions, max(4, images)))
        with durable.replacing(self.folder.path / "before_after.png") as temporary:
            sheets.before_after(*grids).save(temporary)


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    values = [value for row in rows for value in (row[key] if isinstance(row[key], list) else [row[key]])]
    return sum(values) / len(values)
