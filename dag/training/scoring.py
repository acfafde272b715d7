"""Scores the pictures of a batch's trajectories, and differentiates their rewards."""

from collections.abc import Sequence

from torch import Tensor

from dag.chain.policy import Policy
from dag.chain.rollout import Batch
from dag.recipe import Recipe
from dag.rewards import RewardSum


class Scorer:
    """The rewards of a batch's trajectories, and their gradients; see `dag.chain.rollout.Score`.

    Args:
        prompts: all prompts of the recipe.
        batch:   says which of them each trajectory has.
    """

    def __init__(self, recipe: Recipe, policy: Policy, reward: RewardSum, prompts: Sequence[str], batch: Batch) -> None:
        self.policy, self.reward, self.prompts, self.batch = policy, reward, prompts, batch
        self.chunk = recipe.memory.gradient_batch or recipe.train.micro_batch
        self.learnt_parts = {number for number, is_learnt in enumerate(recipe.learnt_rewards) if is_learnt}
        self.exact_parts = {number for number, is_exact in enumerate(recipe.exact_rewards) if is_exact}

    def __call__(self, images: Tensor, rows: Tensor, *, is_preview: bool = False) -> Tensor:
        ids = self.batch.sample_id[rows].tolist()
        return self.reward.total(images, self._texts(rows), ids, is_preview=is_preview)

    def gradient(
        self, latents: Tensor, rows: Tensor, *, is_preview: bool = False, is_learnt: bool = False
    ) -> tuple[Tensor, Tensor]:
        decode = self.policy.preview if is_preview else self.policy.decode
        parts = self.learnt_parts if is_learnt else self.exact_parts
        return self.reward.gradient(latents, self._texts(rows), decode, self.chunk, parts)

    def exact(self, images: Tensor, rows: Tensor, *, is_preview: bool = False) -> Tensor:
        return self.reward.total(images, self._texts(rows), is_preview=is_preview, parts=self.exact_parts)

    def _texts(self, rows: Tensor) -> list[str]:
        return [self.prompts[i] for i in self.batch.prompt_id[rows].tolist()]
