"""Human Preference Score v2 (Wu et al. 2023): a CLIP ViT-H/14 trained on people's rankings of generated pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dag.recipe.reward_sections import HPSv2 as Section
from dag.rewards.clip import VIT_H_CONFIG
from dag.rewards.clip_reward import ClipReward
from dag.rewards.pixels import Preprocessing
from dag.rewards.registry import REWARDS
from dag.rewards.weights import Published

# Version 2.1 is the better one; the original package takes 2.0 by default.
PUBLISHED = {
    "v2.1": Published("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)),
    "v2.0": Published("xswu/HPSv2", ("HPS_v2_compressed.pt",)),
}


@REWARDS.register("hpsv2")
class HPSv2(ClipReward):
    """cosine(image, prompt), about 0.2..0.3."""

    def __init__(self, section: Section, device: torch.device) -> None:
        super().__init__(section, device, PUBLISHED[section.version], VIT_H_CONFIG, Preprocessing(fit="longest"))

    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        return self.cosine(images, prompts, smooth=smooth)
