"""The dict of rewards, and what each of them is."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dag.recipe.registry import Registry
from dag.recipe.reward_sections import RewardTerm

REWARDS = Registry("reward")


class Reward(Protocol):
    """(images (B, 3, H, W) float32 in [0, 1], B prompts) -> (B,) float32, finite, larger is better."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


class PixelReward:
    """A reward computed from the pixels alone: it has no options, and no network that needs a device."""

    def __init__(self, section: RewardTerm, device: torch.device) -> None:
        """Every reward is made from its section and the device of its network."""
