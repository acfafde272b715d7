"""The dict of rewards, and their interface."""

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
        """Takes the arguments of every reward, its section and the device of its network, and needs neither."""
