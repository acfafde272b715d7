"""Rewards: (images (B, 3, H, W) float32 in [0, 1], B prompts) -> (B,) float32, larger is better.

`build_reward(name, **options)` makes one, `RewardSum` adds several with weights, `checked` holds every result to
the standard form. Only this package imports CLIP-like towers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dag.errors import RunError, UsageError
from dag.protocols import Reward
from dag.quiet import quieten
from dag.reward_terms import RewardTerm, Tower
from dag.rewards import (  # noqa: F401  (registers them)
    aesthetic,
    clip_score,
    colourfulness,
    custom,
    image_reward,
    jpeg,
    preference,
    remote,
)
from dag.rewards.registry import REWARDS
from dag.rewards.tower import TowerReward

quieten()


def build_reward(name: str, **options: object) -> Reward:
    """A reward by its registered name. Raises ValueError for an unknown name."""
    return REWARDS[name](**options)


def build_term(term: RewardTerm, device: torch.device) -> Reward:
    """A recipe's reward on the policy's device, or on the CPU if the recipe says so."""
    options = term.model_dump(exclude={"name", "weight", "device", "offload"})
    if isinstance(term, Tower):
        options["device"] = torch.device("cpu") if term.device == "cpu" else device
    return build_reward(term.name, **options)


class RewardSum:
    """sum_i weight_i * reward_i, each part checked under its own name; keeps the parts' means for the metrics."""

    def __init__(
        self,
        terms: Sequence[RewardTerm],
        device: torch.device,
        build: Callable[[RewardTerm, torch.device], Reward] = build_term,
    ) -> None:
        self.device = device
        self.parts = [(term.name, term.weight, build(term, device)) for term in terms]
        self.offloaded = [
            reward
            for term, (_, _, reward) in zip(terms, self.parts, strict=True)
            if isinstance(term, Tower) and term.offload and isinstance(reward, TowerReward)
        ]
        self._move(torch.device("cpu"))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Brings offloaded networks to the device for the time of a phase."""
        self._move(self.device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for reward in self.offloaded:
            reward.to(device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.detailed(images, prompts)[0]

    def detailed(
        self, images: Tensor, prompts: Sequence[str], sample_ids: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(total (B,), {name: unweighted part (B,)}), float32 on the CPU; a repeated name gets #2, #3, ..."""
        parts: dict[str, Tensor] = {}
        total = torch.zeros(len(prompts))
        for name, weight, reward in self.parts:
            values = checked(name, reward, images, prompts, sample_ids)
            total = total + weight * values
            repeated = sum(key.split("#")[0] == name for key in parts)
            parts[f"{name}#{repeated + 1}" if repeated else name] = values
        return total, parts


def checked(
    name: str, reward: Reward, images: Tensor, prompts: Sequence[str], sample_ids: Sequence[int] | None = None
) -> Tensor:
    """The reward's values (B,) float32 on the CPU.

    Raises:
        RunError: it raised, or returned anything but B finite float32 numbers; names the reward, the sample and
            the prompt.
    """
    try:
        with torch.no_grad():
            values = reward(images, prompts)
    except (RunError, UsageError, torch.OutOfMemoryError):
        # Out of memory is for the caller, who can ask for fewer at a time.
        raise
    except Exception as error:
        first = f"sample {sample_ids[0]}, " if sample_ids else ""
        raise RunError(
            f"reward {name} raised {type(error).__name__}: {error} (batch of {len(prompts)}, first: {first}prompt {prompts[0]!r})"
        ) from error
    if not isinstance(values, Tensor) or values.shape != (len(prompts),):
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise RunError(
            f"reward {name} returned {found}; expected a tensor of shape ({len(prompts)},), one number per image"
        )
    if values.dtype != torch.float32:
        raise RunError(f"reward {name} returned dtype {values.dtype}; expected torch.float32")
    values = values.detach().cpu()
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).nonzero()[0])
        where = f"sample {sample_ids[row]}, " if sample_ids else ""
        raise RunError(
            f"reward {name} returned {float(values[row])} for {where}prompt {prompts[row]!r}; rewards must be finite"
        )
    return values


__all__ = ["REWARDS", "RewardSum", "build_reward", "build_term", "checked"]
