"""Measures the pictures of models: rewards, diversity, distance from the base model's pictures, prompt alignment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dag.evaluation.distances import frechet_distance, kernel_distance, vendi_score, within_prompt_diversity
from dag.evaluation.judge import Judge, expected, load_judge, noun_accuracy
from dag.evaluation.perceptual import Distance, within_prompt_distance
from dag.recipe.reward_sections import RewardTerm
from dag.rewards import RewardSum
from dag.rewards.clip import ClipTower

Row = dict[str, Any]

BASE, BASE_AGAIN = "base", "base, other seeds"
_FEATURES_AT_ONCE = 16


@dataclass(frozen=True)
class Task:
    """What every model draws: n pictures of each of P prompts, the pictures of a prompt next to each other."""

    prompts: list[str]
    """(P * n,) the prompt of each picture."""
    images_per_prompt: int
    seed: int


class Measure:
    """Measures the pictures that models drew for one task.

    Args:
        tower: CLIP model; diversity and distances use its image features, alignment also its text features.
        distances: perceptual distances by name; the mean of each within a prompt is one more measure of diversity.

    Attributes:
        judge: measures noun_top1; None if it does not know the thing in every prompt.
    """

    def __init__(
        self,
        task: Task,
        rewards: Sequence[RewardTerm],
        tower: ClipTower,
        distances: Mapping[str, Distance],
        device: torch.device,
    ) -> None:
        self.task, self.tower, self.distances = task, tower, distances
        self.rewards = RewardSum(rewards, device)
        is_known = all(expected(prompt) is not None for prompt in task.prompts)
        self.judge: Judge | None = load_judge() if is_known else None

    def rows(self, pictures: Mapping[str, Tensor]) -> list[Row]:
        """One row of measures for each model's pictures (N, 3, H, W); BASE and BASE_AGAIN must be among the models.

        Gains in reward are over BASE, which drew the same seeds. Distances are to BASE_AGAIN, which drew other seeds:
        reusing the seeds would make a hardly changed model look too close. BASE's own row is the noise floor.
        """
        features = {name: self._features(images) for name, images in pictures.items()}
        with self.rewards.at_work():
            rewards = {name: self.rewards.detailed(images, self.task.prompts)[1] for name, images in pictures.items()}
        return [
            {
                "model": name,
                "rewards": {key: self._reward(values, rewards[BASE][key]) for key, values in rewards[name].items()},
                **self._spread(features[name], images),
                **self._distances(features[name], None if name == BASE_AGAIN else features[BASE_AGAIN]),
                **self._alignment(features[name], images),
            }
            for name, images in pictures.items()
        ]

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.tower.embed_images(part).cpu() for part in images.split(_FEATURES_AT_ONCE)])

    def _spread(self, features: Tensor, images: Tensor) -> Row:
        """Measures of diversity within prompts, averaged over prompts."""
        count = self.task.images_per_prompt
        return {
            "diversity": within_prompt_diversity(features, count),
            "vendi": sum(map(vendi_score, features.split(count))) * count / len(features),
            **{key: within_prompt_distance(distance, images, count) for key, distance in self.distances.items()},
        }

    def _distances(self, features: Tensor, reference: Tensor | None) -> Row:
        """Distances to the pictures with the features `reference`; None where there is nothing to compare with."""
        if reference is None:
            return {"frechet": None, "kernel": None}
        return {"frechet": frechet_distance(features, reference), "kernel": kernel_distance(features, reference)}

    def _alignment(self, features: Tensor, images: Tensor) -> Row:
        """Agreement of pictures and prompts: 100 x the mean CLIP cosine, and noun_top1 where the judge is at hand."""
        prompts = self.task.prompts
        row = {"alignment": float(100 * (features * self.tower.embed_texts(prompts).cpu()).sum(1).mean())}
        if self.judge is not None and images.shape[-1] == 64:
            row["noun_top1"], row["noun_top5"] = noun_accuracy(self.judge, images, prompts)
        return row

    def _reward(self, values: Tensor, base: Tensor) -> dict[str, float | None]:
        """Mean, standard deviation, and the gain over the base model with its standard error over prompts.

        The standard error is None for a single prompt.
        """
        gain = (values - base).reshape(-1, self.task.images_per_prompt).mean(1)
        error = float(gain.std() / len(gain) ** 0.5) if len(gain) > 1 else None
        return {
            "mean": float(values.mean()),
            "sd": float(values.std(correction=0)),
            "gain": float(gain.mean()),
            "gain_error": error,
        }
