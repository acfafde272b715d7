"""PickScore (Kirstain et al. 2023): a CLIP ViT-H/14 trained on the choices of people who generate pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dag.recipe.reward_sections import PickScore as Section
from dag.rewards.clip import HUB_FILES, VIT_H_CONFIG
from dag.rewards.clip_reward import ClipReward
from dag.rewards.pixels import Preprocessing
from dag.rewards.registry import REWARDS
from dag.rewards.weights import Published

PUBLISHED = Published("yuvalkirstain/PickScore_v1", HUB_FILES)


@REWARDS.register("pickscore")
class PickScore(ClipReward):
    """exp(logit_scale) * cosine(image, prompt), about 20: the raw logit, no softmax."""

    def __init__(self, section: Section, device: torch.device) -> None:
        super().__init__(section, device, PUBLISHED, VIT_H_CONFIG, Preprocessing(crop_rounding="down"))

    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        # No cleaning: the original code gives prompts to the tokenizer as they are.
        return self.tower.logit_scale * self.cosine(images, prompts, smooth=smooth, cleaning=None)
