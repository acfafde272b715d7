"""Cosine between picture and prompt in CLIP's embedding space, in its usual variants."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dag.recipe.reward_sections import ClipScore as Section
from dag.rewards.clip import VIT_L
from dag.rewards.clip_reward import ClipReward
from dag.rewards.registry import REWARDS


@REWARDS.register("image_text")
@REWARDS.register("clip_score")
class ClipScore(ClipReward):
    """scale * cosine(image, prefix + prompt), (B,) float32.

    `clip_score` is ImageReward's CLIPScore by default, the plain cosine. Hessel et al. (2021) is `scale: 2.5, clamp:
    true, prefix: "A photo depicts "` with ViT-B/32; torchmetrics is `scale: 100, clamp: true`. A clamp has no gradient
    below 0. `image_text` differs in its defaults alone: 100 * cosine by the small scorer that ships with this package.
    """

    def __init__(self, section: Section, device: torch.device) -> None:
        super().__init__(section, device, VIT_L)
        self.section = section

    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        texts = [self.section.prefix + prompt for prompt in prompts]
        cosine = self.cosine(images, texts, smooth=smooth)
        return self.section.scale * (cosine.clamp(min=0) if self.section.clamp else cosine)
