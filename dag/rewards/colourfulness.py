"""Colourfulness of Hasler and Suesstrunk (2003), Eq. (C2), divided by 10 to be of order ten."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dag.rewards.registry import REWARDS, PixelReward


@REWARDS.register("colourfulness")
class Colourfulness(PixelReward):
    """sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2) on the 0..255 scale, over 10.

    rg = R - G and yb = (R + G) / 2 - B are opponent colours; variances are over the pixels (biased).
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        red, green, blue = (images.float() * 255).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1).flatten(2)  # (B, 2, H W)
        spread = _root(opponents.var(dim=2, correction=0).sum(1))
        offset = _root(opponents.mean(dim=2).square().sum(1))
        return (spread + 0.3 * offset) / 10


def _root(x: Tensor) -> Tensor:
    """Square roots (B,), whose gradient is 0 instead of infinite at 0: on a picture of one colour."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)
