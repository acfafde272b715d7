"""Rewards: (images (B, 3, H, W) float32 in [0, 1], B prompts) -> (B,) float32, larger is better.

`build_reward` makes one from its section of a recipe, `RewardSum` adds several with weights, `checked` raises if a result is
not of this form. Other packages get CLIP models for measuring pictures from `dag.rewards.clip`. README.md says how to add a
reward.
"""

import importlib
import pkgutil

from dag.quiet import quieten
from dag.rewards.registry import REWARDS, Reward
from dag.rewards.reward_sum import RewardSum, build_reward, checked, scored

quieten()

# A reward registers itself when its module is imported. `serve` is a program, which nothing imports.
for _module in pkgutil.iter_modules(__path__):
    if _module.name != "serve":
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["REWARDS", "Reward", "RewardSum", "build_reward", "checked", "scored"]
