"""The rewards of a recipe, made from their sections and added with their weights. Every value is checked."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dag.errors import RunError, UsageError
from dag.recipe.reward_sections import RewardTerm, Tower
from dag.rewards.registry import REWARDS, Reward
from dag.rewards.stand_in import StandIn
from dag.rewards.tower import TowerReward
from dag.run.gpu import is_out_of_memory

# Scores of previews on a GPU are checked together, after at most this many.
_MOST_UNCHECKED = 256


def build_reward(term: RewardTerm, device: torch.device) -> Reward:
    """The reward that a section describes. Its network is on `device`, or on the CPU if the section says so."""
    if isinstance(term, Tower):
        device = torch.device("cpu") if term.device == "cpu" else device
        if term.path == "random":
            return StandIn(term, device)
    return REWARDS[term.name](term, device)


class RewardSum:
    """sum_i weight_i * reward_i, each part checked under its own name.

    Args:
        device: the policy's device, on which the values are added.
        build:  makes the reward of a section; forecasts replace it to avoid downloads.
    """

    def __init__(
        self,
        terms: Sequence[RewardTerm],
        device: torch.device,
        build: Callable[[RewardTerm, torch.device], Reward] = build_reward,
    ) -> None:
        self.device = device
        self.parts = [(term.name, term.weight, build(term, device)) for term in terms]
        self.offloaded = [
            reward
            for term, (_, _, reward) in zip(terms, self.parts, strict=True)
            if isinstance(term, Tower) and term.offload and term.device != "cpu" and isinstance(reward, TowerReward)
        ]
        self._unchecked: list[_Answer] = []
        self._move(torch.device("cpu"))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A context in which offloaded networks are on the device; afterwards they are on the CPU again."""
        self._move(self.device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for reward in self.offloaded:
            reward.to(device)

    def total(
        self,
        images: Tensor,
        prompts: Sequence[str],
        sample_ids: Sequence[int] | None = None,
        *,
        is_preview: bool = False,
        parts: Collection[int] | None = None,
    ) -> Tensor:
        """(B,) float32 weighted sum on the policy's device.

        Args:
            sample_ids: B ids of the images, for error messages.
            is_preview: the images are pictures of x0_hat. Networks then read them without a detour through the CPU, and
                values on a GPU are checked later, by `check`, so that the CPU need not wait for the device now.
            parts:      the numbers of the rewards; None takes all.

        Raises:
            RunError: a reward failed, or a value is not finite.
        """
        total = torch.zeros(len(prompts), device=self.device)
        found = self._parts(images, prompts, sample_ids, is_preview, parts)
        for (_, weight, _), values in zip(self._chosen(parts), found, strict=True):
            total = total + weight * values.to(self.device, non_blocking=True)
        if not is_preview or len(self._unchecked) >= _MOST_UNCHECKED:
            self.check()
        return total

    def detailed(
        self, images: Tensor, prompts: Sequence[str], sample_ids: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted sum (B,), {name: unweighted values (B,)}), float32 on the CPU. A repeated name gets #2, #3, ..."""
        parts: dict[str, Tensor] = {}
        total = torch.zeros(len(prompts))
        found = self._parts(images, prompts, sample_ids, False, None)
        self.check()
        for (name, weight, _), values in zip(self.parts, found, strict=True):
            values = values.cpu()
            total = total + weight * values
            repeated = sum(key.split("#")[0] == name for key in parts)
            parts[f"{name}#{repeated + 1}" if repeated else name] = values
        return total, parts

    def gradient(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        decode: Callable[[Tensor], Tensor],
        chunk: int,
        parts: Collection[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of some rewards of decoded latents, and its gradient with respect to the latents.

        Decoder and rewards are back-propagated for a few pictures at a time; that bounds the memory, and changes no number.

        Args:
            latents: (B, C, H, W).
            prompts: B prompts.
            decode:  gives the pictures (b, 3, H, W) of latents, with gradients.
            chunk:   pictures per backward pass.
            parts:   the numbers of the rewards; None takes all. All of them must have a gradient.

        Returns:
            ((B,) values, (B, C, H, W) gradients), float32 on the latents' device.

        Raises:
            RunError: a reward failed, or has no gradient.
        """
        chosen, values, gradients = self._chosen(parts), [], []
        for start in range(0, len(latents), chunk):
            texts = prompts[start : start + chunk]
            with torch.enable_grad():
                x = latents[start : start + chunk].detach().float().requires_grad_(True)
                images, total = decode(x), torch.zeros(len(x), device=latents.device)
                for name, weight, reward in chosen:
                    total = total + weight * differentiable(name, reward, images, texts).to(latents.device)
                (of_pixels,) = torch.autograd.grad(total.sum(), images)
                # Scaled to order one, so that a decoder in half precision neither overflows nor rounds to zero.
                size = of_pixels.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
                (gradient,) = torch.autograd.grad(images, x, of_pixels / size)
            values.append(total.detach())
            gradients.append(size * gradient)
        return torch.cat(values), torch.cat(gradients)

    def _chosen(self, parts: Collection[int] | None) -> list[tuple[str, float, Reward]]:
        """(name, weight, reward) of the rewards with these numbers; None takes all."""
        return [part for number, part in enumerate(self.parts) if parts is None or number in parts]

    def _parts(
        self,
        images: Tensor,
        prompts: Sequence[str],
        sample_ids: Sequence[int] | None,
        is_preview: bool,
        parts: Collection[int] | None,
    ) -> list[Tensor]:
        """(B,) values of each reward, on the device where it computed them; those on a GPU are checked later, by `check`."""
        found = []
        for name, _, reward in self._chosen(parts):
            values = scored(name, reward, images, prompts, sample_ids, is_preview)
            answer = _Answer(name, values, list(prompts), None if sample_ids is None else list(sample_ids))
            if values.device.type == "cpu":
                answer.check()
            else:
                self._unchecked.append(answer)
            found.append(values)
        return found

    def check(self) -> None:
        """Check the values that are not checked yet, waiting for the device once. Raises RunError if one is not finite."""
        unchecked, self._unchecked = self._unchecked, []
        if unchecked and not bool(torch.stack([answer.values.isfinite().all() for answer in unchecked]).all()):
            for answer in unchecked:
                answer.check()


@dataclass(frozen=True)
class _Answer:
    """A reward's values for a batch, with the names that an error message needs."""

    name: str
    values: Tensor
    prompts: Sequence[str]
    sample_ids: Sequence[int] | None

    def check(self) -> None:
        """Raises RunError, naming the reward, the sample and the prompt, unless all values are finite."""
        values = self.values.cpu()
        if not bool(values.isfinite().all()):
            row = int((~values.isfinite()).nonzero()[0])
            where = f"sample {self.sample_ids[row]}, " if self.sample_ids else ""
            raise RunError(
                f"reward {self.name} returned {float(values[row])} for {where}prompt {self.prompts[row]!r}; "
                "rewards must be finite"
            )


def checked(
    name: str, reward: Reward, images: Tensor, prompts: Sequence[str], sample_ids: Sequence[int] | None = None
) -> Tensor:
    """The reward's values (B,) float32 on the CPU. Raises what `scored` raises, and RunError if a value is not finite."""
    values = scored(name, reward, images, prompts, sample_ids).cpu()
    _Answer(name, values, prompts, sample_ids).check()
    return values


def differentiable(name: str, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward's values (B,) with gradients to the images. Raises RunError if the reward failed or gave no gradient."""
    values = _called(name, reward, images, prompts, None, {"grad": True})
    if not values.requires_grad:
        raise RunError(f"reward {name} has no gradient; use objective.reward_gradient=learnt")
    return values


def scored(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    sample_ids: Sequence[int] | None = None,
    is_preview: bool = False,
) -> Tensor:
    """The reward's values (B,) float32, on the device where it computed them.

    Raises:
        RunError: the reward raised an error, or returned anything but B float32 numbers. The message names the reward.
        torch.OutOfMemoryError: a GPU ran out of memory, whatever error said so; the caller can ask for fewer at a time.
    """
    with torch.no_grad():
        values = _called(name, reward, images, prompts, sample_ids, {"is_preview": True} if is_preview else {})
    if not isinstance(values, Tensor) or values.shape != (len(prompts),):
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise RunError(
            f"reward {name} returned {found}; expected a tensor of shape ({len(prompts)},), one number per image"
        )
    if values.dtype != torch.float32:
        raise RunError(f"reward {name} returned dtype {values.dtype}; expected torch.float32")
    return values.detach()


def _called(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    sample_ids: Sequence[int] | None,
    options: dict[str, bool],
) -> Tensor:
    """What the reward returns; whatever it raises becomes an error that names it. `options` are those of rewards with a network."""
    try:
        return reward(images, prompts, **(options if isinstance(reward, TowerReward) else {}))
    except (RunError, UsageError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from None
        first = f"sample {sample_ids[0]}, " if sample_ids else ""
        raise RunError(
            f"reward {name} raised {type(error).__name__}: {error} (batch of {len(prompts)}, first: {first}prompt {prompts[0]!r})"
        ) from error
