"""Colourfulness of Hasler and Suesstrunk (2003), Eq. (C2), divided by 10 to be of order ten."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dag.rewards.registry import REWARDS, PixelReward

_SMALLEST = 1e-24


@REWARDS.register("colourfulness")
class Colourfulness(PixelReward):
    """sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2) on the 0..255 scale, over 10.

    rg = R - G and yb = (R + G) / 2 - B are opponent colours; variances are over the pixels (biased).
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        red, green, blue = (images.float() * 255).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1).flatten(2)  # (B, 2, H W)
        # The smallest values keep the gradient of the root finite on a picture of one colour.
        spread = opponents.var(dim=2, correction=0).sum(1).clamp(min=_SMALLEST).sqrt()
        offset = opponents.mean(dim=2).square().sum(1).clamp(min=_SMALLEST).sqrt()
        return (spread + 0.3 * offset) / 10
