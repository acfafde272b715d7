"""Draw the base model and trained ones with the same seeds, and measure the pictures.

The base model and every run draw the same prompts with the same seeds. Measured are the rewards that the runs were trained
on, other rewards (over-optimisation shows there), diversity within a prompt, the distance from the base model's pictures, and
prompt alignment. The base model draws a second time with other seeds. All distances are to those second pictures, so the
base model's own distance is the noise floor.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dag.chain.rollout import generate, generate_beside_pretrained
from dag.chain.sample_ids import COMPARISON, COMPARISON_AGAIN
from dag.errors import UsageError
from dag.evaluation.measure import BASE, BASE_AGAIN, Measure, Task
from dag.evaluation.perceptual import Distance, load_distance
from dag.evaluation.searched import SearchFolder
from dag.models import families
from dag.models.source import EMBEDDED, local_folder
from dag.recipe import Recipe
from dag.recipe.load import parse_reward
from dag.recipe.prompts import load_prompts
from dag.recipe.reward_sections import RewardTerm
from dag.rewards.clip import ClipTower, feature_tower
from dag.run import checkpoint, durable
from dag.run.folder import RunFolder
from dag.run.machine import versions

# Rewards that cost nothing to add, whatever was trained on.
_ALWAYS = ("colourfulness", "compressibility")


def evaluate(
    runs: Sequence[Path],
    device: torch.device,
    prompts: Sequence[str] | None = None,
    num_prompts: int = 16,
    images_per_prompt: int = 8,
    rewards: Sequence[RewardTerm] = (),
    features: str | None = None,
    distances: Sequence[str] = (),
    training_passes: Callable[[Recipe], float] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Draw pictures with trained runs and with their base model, and measure them, and those that searches have found.

    Args:
        runs:     folders of runs and, after the first, of searches.
        prompts:  the prompts to draw; None takes the first `num_prompts` of the first run.
        rewards:  rewards to measure besides those that the runs were trained on and those that need no weights.
        features: `embedded` or a CLIP model; None takes `embedded`, which is possible for the embedded model only.
        distances: names of perceptual distances, from `dag.evaluation.perceptual.DISTANCES`.
        training_passes: counts the denoiser's passes in a run's training, for the report; None leaves them out.

    Returns:
        (report, pictures by model's name): the report goes to JSON; pictures are (P * n, 3, H, W) in [0, 1].

    Raises:
        UsageError: the runs differ in their base model or sampler, an argument is out of range, a package is missing.
        RunError:   a run has no checkpoint, or weights cannot be fetched.
    """
    judged = _judged(runs)
    recipes, first = [one.recipe for one in judged], judged[0].recipe
    _refuse_different(runs, recipes)
    if images_per_prompt < 2 or num_prompts < 1:
        raise UsageError("--images must be at least 2 (diversity is between pictures) and --prompts at least 1")
    chosen = list(prompts or _prompts_of(first)[:num_prompts])
    task = Task([prompt for prompt in chosen for _ in range(images_per_prompt)], images_per_prompt, first.seed)
    source, tower, known_distances = instruments(first, features, distances, device)
    measure = Measure(task, _all_rewards(recipes, rewards), tower, known_distances, device)
    drawn = list(_drawn(judged, chosen, task, device))
    pictures = {one.name: one.images for one in drawn}
    trainings = {one.name: training_passes(one.recipe) for one in judged if training_passes and one.search is None}
    rows = [
        {**row, "path_kl": one.path_kl, "passes": one.passes, "training_passes": trainings.get(one.name)}
        for row, one in zip(measure.rows(pictures), drawn, strict=True)
    ]
    report_data = {
        "features": source,
        "distances": list(known_distances),
        "prompts": chosen,
        "num_prompts": num_prompts,
        "images_per_prompt": images_per_prompt,
        "seed": task.seed,
        "checkpoints": {one.name: one.what for one in judged},
        "weights": _hashes(judged),
        "trained_on": [[term.name for term in recipe.reward] for recipe in recipes],
        "versions": versions(),
        "models": rows,
    }
    return report_data, pictures


def instruments(
    recipe: Recipe,
    features: str | None,
    distances: Sequence[str],
    device: torch.device,
    key: str = "--features",
) -> tuple[str, ClipTower, dict[str, Distance]]:
    """Load the networks that pictures of a recipe's model are compared with.

    Args:
        key: the option or recipe key that held `features`, for error messages.

    Returns:
        (name of the feature space, the CLIP model of these features, perceptual distances by name)

    Raises:
        UsageError: `features` is no CLIP model, or is None where it is needed; or a package is missing.
        RunError:   weights cannot be fetched.
    """
    is_embedded = local_folder(recipe.model.path) == EMBEDDED
    source = features or ("embedded" if is_embedded else None)
    if source is None:
        raise UsageError(f"{key}: name a CLIP model for this base model, e.g. openai/clip-vit-large-patch14")
    found = {name: load_distance(name, device) for name in sorted(set(distances))}
    return source, feature_tower(key, source, device), found


@dataclass(frozen=True)
class _Judged:
    """A run with the checkpoint of it that is judged, or a search, whose pictures are drawn already."""

    name: str
    recipe: Recipe
    checkpoint: Path | None
    search: SearchFolder | None = None

    @property
    def what(self) -> str:
        """What is judged, for the report."""
        if self.checkpoint is not None:
            return self.checkpoint.name
        assert self.search is not None
        return f"search by {self.search.read_recipe().search.name}"

    @property
    def sha256(self) -> str:
        """Of the trained weights, or of the search's results."""
        if self.checkpoint is not None:
            return durable.sha256(self.checkpoint / "policy.safetensors")
        assert self.search is not None
        return durable.sha256(self.search.results)


def _judged(runs: Sequence[Path]) -> list[_Judged]:
    """The runs, each with its newest checkpoint, and the searches among them.

    Raises UsageError if one is neither, or the first one a search; RunError if a run has no weights.
    """
    found: list[_Judged] = []
    for name, path in zip(_names(runs), runs, strict=True):
        search = SearchFolder(path)
        if search.is_one() and found:
            search.read_results()
            found.append(_Judged(name, search.read_recipe().as_training(), None, search))
            continue
        folder = RunFolder.open(path)
        found.append(_Judged(name, folder.read_recipe(), checkpoint.chosen(folder.checkpoints)))
    return found


def weights_of(runs: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of the trained weights, by the run's name. Raises RunError if a run has none."""
    return _hashes(_judged(runs))


def _hashes(judged: Sequence[_Judged]) -> dict[str, str]:
    return {one.name: one.sha256 for one in judged}


def _refuse_different(runs: Sequence[Path], recipes: Sequence[Recipe]) -> None:
    """Raise UsageError if base models or samplers differ: the pictures would then not compare the training."""
    keys = (
        "model.path",
        "model.revision",
        "model.variant",
        "model.dtype",
        "model.resolution",
        "memory.base",
        "sampler.steps",
        "sampler.eta",
        "sampler.guidance_scale",
        "sampler.guidance_dtype",
        "sampler.noise_dtype",
        "sampler.chain_dtype",
    )
    for key in keys:
        section, name = key.split(".")
        found = [getattr(getattr(recipe, section), name) for recipe in recipes]
        for run, value in zip(runs, found, strict=True):
            if value != found[0]:
                raise UsageError(
                    f"--against {run}: {key} is {value}, but {found[0]} in {runs[0]}; compare like with like"
                )


def _prompts_of(recipe: Recipe) -> Sequence[str]:
    found = load_prompts(recipe.prompts)
    return found.held_out if recipe.evaluation.held_out else found.training


def _all_rewards(recipes: Sequence[Recipe], given: Sequence[RewardTerm]) -> list[RewardTerm]:
    """Every reward once: those trained on first, then the `given` ones, then those that cost nothing."""
    free = [parse_reward(name, []) for name in _ALWAYS]
    terms = [term for recipe in recipes for term in recipe.reward] + [*given, *free]
    # The same name with other options is another reward. Weights are left out: they matter only in a sum.
    unique: dict[str, RewardTerm] = {}
    for term in terms:
        unique.setdefault(repr(term.model_copy(update={"weight": 1.0})), term)
    return list(unique.values())


@dataclass(frozen=True)
class _Drawn:
    """The pictures (N, 3, H, W) of a model, and how far its trajectories are from the base model's."""

    name: str
    images: Tensor
    path_kl: float | None
    """Nats a picture, see `generate_beside_pretrained`; None of a search, and after a full fine-tune, which keeps no pretrained
    copy."""
    passes: float
    """Guided forward passes of the denoiser for a picture, without training."""


def _drawn(judged: Sequence[_Judged], chosen: Sequence[str], task: Task, device: torch.device) -> Iterator[_Drawn]:
    """The base model's pictures, those of other seeds, then those of each run or search."""
    for one in judged:
        recipe, steps = one.recipe, float(one.recipe.sampler.steps)
        if one.search is not None:
            passes = one.search.read_results()["passes"]
            yield _Drawn(one.name, one.search.found(chosen, task.images_per_prompt), None, passes)
            continue
        assert one.checkpoint is not None
        policy = families.load(recipe, device)
        text = policy.encode(list(chosen)).repeat_interleave(task.images_per_prompt, dim=0)
        policy.free_text_encoder()
        same, other = (first + torch.arange(len(text)) for first in (COMPARISON, COMPARISON_AGAIN))
        # The tile size that training ended with fits in memory here too.
        tile = int(checkpoint.load_state(one.checkpoint)["tile"])
        drawn = task.seed, recipe.sampler, tile
        with policy.decoder.at_work():
            if one is judged[0]:
                yield _Drawn(BASE, generate(policy, text, same, *drawn), 0.0, steps)
                yield _Drawn(BASE_AGAIN, generate(policy, text, other, *drawn), 0.0, steps)
            policy.load_state_dict(checkpoint.load_tensors(one.checkpoint, "policy"))
            if recipe.adapter.kind == "lora":
                yield _Drawn(one.name, *generate_beside_pretrained(policy, text, same, *drawn), steps)
            else:
                yield _Drawn(one.name, generate(policy, text, same, *drawn), None, steps)
        # Freed before the next model is built.
        del policy


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of the runs: the folders' names, with as many parent folders as make them differ, also from BASE."""
    for depth in range(1, 10):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len({*names, BASE, BASE_AGAIN}) == len(names) + 2:
            return names
    raise UsageError("--against: a run is named twice")
