"""Sampling P_F: chains of states, the scalars that training needs, and the images that the chains end in.

The noise of a sample depends on (seed, global sample id, step) alone, so a trajectory does not depend on the tile
it was sampled in, beyond the float rounding of the network. States are rounded to the stored dtype *before* their
log-probs are taken and before the next UNet call.

Legend: N trajectories, B rows of a tile, T transitions.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from dag_kernels import SampledStep
from torch import Tensor

from dag.chain.policy import Policy, Prediction
from dag.chain.schedule import INITIAL_NOISE, Schedule
from dag.chain.trajectory import Trajectories, draw_noise
from dag.recipe import ForwardLooking, Sampler, is_scored

CHAIN_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Score(Protocol):
    """Computes the rewards (B,) of images (B, 3, H, W) in [0, 1].

    `rows` (B,) says to which trajectories of a batch the images belong, and thereby their prompts and sample ids.
    `is_preview` is set for pictures of x0_hat, which may be scored less exactly than final ones (`dag.rewards.tower`).
    """

    def __call__(self, images: Tensor, rows: Tensor, *, is_preview: bool = False) -> Tensor: ...

    def gradient(
        self, latents: Tensor, rows: Tensor, *, is_preview: bool = False, is_learnt: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(rewards (B,), their gradients (B, C, H, W)) at clean latents, of the rewards whose exact gradient is taken, or with
        `is_learnt` of the others."""
        ...

    def exact(self, images: Tensor, rows: Tensor, *, is_preview: bool = False) -> Tensor:
        """The sum (B,) of the rewards whose exact gradient is taken."""
        ...


@dataclass(frozen=True)
class Batch:
    """The prompts and sample ids of trajectories to be sampled."""

    prompt_id: Tensor
    """(N,) int64 on the CPU."""
    sample_id: Tensor
    """(N,) int64 on the CPU, unique over all epochs (`dag.chain.sample_ids`)."""

    def tiles(self, size: int) -> Iterator["Batch"]:
        """The batch in parts of at most `size`."""
        for start in range(0, len(self.sample_id), size):
            yield Batch(self.prompt_id[start : start + size], self.sample_id[start : start + size])

    def tail(self, start: int) -> "Batch":
        """The batch without its first `start` trajectories."""
        return Batch(self.prompt_id[start:], self.sample_id[start:])


@dataclass(frozen=True)
class Step:
    """One transition of B samples, x_t to x_next."""

    k: int
    x_t: Tensor
    """(B, C, H, W) in the chain's dtype; float32 where its gradient is taken."""
    prediction: Prediction
    """The network's output at x_t, with gradients if the step is trained."""
    sampled: SampledStep
    """x_next, x0_hat and the log-probs; with `has_prior` log_pb is the pretrained model's log P_F."""
    pretrained: Tensor | None = None
    """(B, C, H, W) the pretrained network's output at x_t; None without `has_prior`."""

    @property
    def x_next(self) -> Tensor:
        return self.sampled.x_next


def walk(
    policy: Policy,
    text: Tensor,
    sample_id: Tensor,
    seed: int,
    sampler: Sampler,
    *,
    has_prior: bool = False,
    start_id: Tensor | None = None,
    trained: Container[int] = (),
    differentiated: Container[int] = (),
) -> Iterator[Step]:
    """Denoise B samples from noise, one transition at a time.

    Args:
        text:      (B, S, D) prompt embeddings on the policy's device.
        sample_id: (B,) int64 on the policy's device.
        has_prior: replace log P_B by the pretrained model's log P_F, see `against_prior`.
        start_id:  (B,) int64, whose first noise each sample begins with; None takes its own.
        trained:   the steps k whose predictions get gradients with respect to the weights.
        differentiated: the steps k whose predictions get gradients with respect to x_t.
    """
    schedule = policy.schedule
    x_t = first_state(policy, sample_id if start_id is None else start_id, seed, sampler)
    for k in range(schedule.num_transitions):
        if k in differentiated:
            x_t = x_t.detach().float().requires_grad_(True)  # the gradient has its dtype
        with torch.set_grad_enabled(k in trained or k in differentiated):
            prediction = policy.predict(x_t, schedule.timesteps[k].expand(len(x_t)), text)
        sampled, pretrained = take_step(schedule, x_t, prediction, k, seed, sample_id, sampler), None
        if has_prior:
            sampled, pretrained = against_prior(policy, sampled, x_t, text, k)
        yield Step(k, x_t, prediction, sampled, pretrained)
        x_t = sampled.x_next


@dataclass(frozen=True)
class SampledTile:
    """B sampled trajectories that are not yet scored."""

    chain: Tensor
    """(T + 1, B, C, H, W) states, noisiest first."""
    log_pf: Tensor
    """(B, T) sums over latent dims."""
    log_pb: Tensor
    """(B, T) sums over latent dims; with `has_prior` the pretrained model's log P_F."""
    x0_hat: dict[int, Tensor]
    """(B, C, H, W) float32 by step k, for the steps that are scored; empty without forward-looking."""
    x_0: Tensor
    """(B, C, H, W) float32 latents to be decoded."""


@torch.no_grad()
def sample_tile(
    policy: Policy,
    text: Tensor,
    sample_id: Tensor,
    seed: int,
    sampler: Sampler,
    forward_looking: ForwardLooking | None = None,
    has_prior: bool = False,
    start_id: Tensor | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> SampledTile:
    """Denoise B samples and keep what training needs.

    Args:
        text:      (B, S, D) prompt embeddings.
        sample_id: (B,) int64.
        forward_looking: the section that says which x0_hat are kept for scoring; None keeps none.
        has_prior: replace log P_B by the pretrained model's log P_F, see `against_prior`.
        start_id:  see `walk`; on any device.
        on_step:   called after each transition, for a progress bar.
    """
    schedule, device = policy.schedule, policy.schedule.timesteps.device
    # Copied once for the tile, not in every transition.
    text, sample_id = text.to(device), sample_id.to(device)
    start_id = None if start_id is None else start_id.to(device)
    states: list[Tensor] = []
    log_pf, log_pb, x0_hat = [], [], {}
    for step in walk(policy, text, sample_id, seed, sampler, has_prior=has_prior, start_id=start_id):
        if not states:
            states.append(step.x_t)
        states.append(step.x_next)
        log_pf.append(step.sampled.log_pf)
        log_pb.append(step.sampled.log_pb)
        if forward_looking is not None and is_scored(step.k, schedule.num_transitions, forward_looking.stride):
            x0_hat[step.k] = clean_latents(schedule, step, forward_looking)
        on_step()
    x_0 = last_latents(policy, states[-1], text)
    return SampledTile(torch.stack(states), torch.stack(log_pf, 1), torch.stack(log_pb, 1), x0_hat, x_0)


def first_state(policy: Policy, sample_id: Tensor, seed: int, sampler: Sampler) -> Tensor:
    """x_T, (B, C, H, W) in the chain's dtype; `sample_id` (B,) is on the policy's device."""
    noise = draw_noise(seed, sample_id, INITIAL_NOISE, policy.latent_shape, noise_dtype(sampler))
    return noise.to(CHAIN_DTYPES[sampler.chain_dtype])


def last_latents(policy: Policy, x_t: Tensor, text: Tensor, *, pretrained: bool = False) -> Tensor:
    """The latents to be decoded, (B, C, H, W) float32: the chain's end x_t, or the schedule's deterministic step from it.

    Args:
        pretrained: the pretrained model takes that step.
    """
    final = policy.schedule.final
    if final is None:
        return x_t.float()
    last = torch.full((len(x_t),), final.timestep, device=x_t.device)
    return final(x_t, policy.predict(x_t, last, text, pretrained=pretrained).guided)


@torch.no_grad()
def take_step(
    schedule: Schedule, x_t: Tensor, prediction: Prediction, k: int, seed: int, sample_id: Tensor, sampler: Sampler
) -> SampledStep:
    """One transition, by the fused step; published deviations that it lacks take the slower path below."""
    chain_dtype, dtype_of_noise = CHAIN_DTYPES[sampler.chain_dtype], noise_dtype(sampler)
    if dtype_of_noise == torch.float32 and sampler.log_pf_at == "stored":
        branches, scale = prediction.branches, prediction.guidance_scale
        return schedule.sampling_step(x_t, branches, k, seed, sample_id, scale, chain_dtype)
    noise = draw_noise(seed, sample_id, k, tuple(x_t.shape[1:]), dtype_of_noise)
    unrounded = schedule.sample_next(x_t, prediction.guided, noise, k)
    x_next = unrounded.to(chain_dtype)
    evaluated_at = x_next if sampler.log_pf_at == "stored" else unrounded
    log_pf = schedule.log_pf(x_t, evaluated_at, prediction.guided, k)
    x0_hat = schedule.x0_hat(x_t.float(), prediction.guided, k)
    return SampledStep(x_next, x0_hat, log_pf, schedule.log_pb(x_t, x_next, k))


@torch.no_grad()
def against_prior(policy: Policy, step: SampledStep, x_t: Tensor, text: Tensor, k: int) -> tuple[SampledStep, Tensor]:
    """(the step with the pretrained model's log p_pre(x_next | x_t), (B,), in place of log P_B; that model's output at x_t).

    The balance

        log F(x_t) + log P_F(x_next | x_t) = log F(x_next) + log p_pre(x_next | x_t),    log F(x_0) = beta r(x_0)

    telescopes over a chain to P_F(chain | x_T) = p_pre(chain | x_T) exp(beta r(x_0)) / F(x_T). So the target is the
    pretrained model's distribution times exp(beta r), whereas with P_B it is exp(beta r) alone.
    """
    pretrained = policy.predict(x_t, policy.schedule.timesteps[k].expand(len(x_t)), text, pretrained=True).guided
    return step._replace(log_pb=policy.schedule.log_pf(x_t, step.x_next, pretrained, k)), pretrained


@torch.no_grad()
def clean_latents(schedule: Schedule, step: Step, section: ForwardLooking) -> Tensor:
    """The x0_hat (B, C, H, W) that the recipe scores: the one that the step computed, or one of the published forms."""
    if section.prediction == "guided" and section.coefficients == "fp32":
        return step.sampled.x0_hat
    return predicted_x0(schedule, step.x_t, step.prediction, step.k, section)


def predicted_x0(schedule: Schedule, x_t: Tensor, prediction: Prediction, k: int, section: ForwardLooking) -> Tensor:
    """x0_hat (B, C, H, W) float32 at state k, as the recipe's `forward_looking` section defines it."""
    output = prediction.guided if section.prediction == "guided" else prediction.conditional
    if section.coefficients == "fp32":
        return schedule.x0_hat(x_t.float(), output, k)
    x0_x, x0_output = schedule.x0_in_bfloat16[k]
    return x0_x * x_t.float() + x0_output * output


@torch.no_grad()
def score_tile(
    policy: Policy, tile: SampledTile, score: Score, on_image: Callable[[], object] = lambda: None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Decode and score a tile: ((B, T) rewards of x0_hat or None, (B,) rewards of x_0, images (B, 3, H, W)).

    A state that is not scored takes the newest reward before it.

    Args:
        on_image: called after each scored picture of the tile's B trajectories, for a progress bar.
    """
    rows = torch.arange(len(tile.x_0))
    x0_hat_reward: list[Tensor] = []
    for k in range(tile.log_pf.shape[1] if tile.x0_hat else 0):
        if k in tile.x0_hat:
            x0_hat_reward.append(score(policy.preview(tile.x0_hat[k]), rows, is_preview=True))
            on_image()
        else:
            x0_hat_reward.append(x0_hat_reward[-1])
    images = policy.decode(tile.x_0)
    reward = score(images, rows)
    on_image()
    return torch.stack(x0_hat_reward, 1) if x0_hat_reward else None, reward, images


def assemble(
    tile: SampledTile, x0_hat_reward: Tensor | None, reward: Tensor, batch: Batch, seed: int, sampler: Sampler
) -> Trajectories:
    """The scalars of a scored tile, on its device, with an empty chain: the chain itself goes to the `ChainStore`."""
    device = tile.chain.device
    return Trajectories(
        chain=tile.chain.new_empty(0),
        log_pf=tile.log_pf,
        log_pb=tile.log_pb,
        x0_hat_reward=None if x0_hat_reward is None else x0_hat_reward.to(device),
        reward=reward.to(device),
        prompt_id=batch.prompt_id,
        sample_id=batch.sample_id.to(device),
        seed=seed,
        noise_dtype=noise_dtype(sampler),
    )


def generate(
    policy: Policy,
    text: Tensor,
    sample_id: Sequence[int] | Tensor,
    seed: int,
    sampler: Sampler,
    tile: int | None = None,
) -> Tensor:
    """(N, 3, H, W) images in [0, 1], on the CPU, by the sampler that training uses.

    Args:
        text:      (N, S, D) prompt embeddings.
        sample_id: N ids, which with the seed determine the noise.
        tile:      samples per network call; None takes the sampler's.
    """
    ids, tile = torch.as_tensor(sample_id, dtype=torch.int64), tile or sampler.tile
    images = []
    for part, part_ids in zip(text.split(tile), ids.split(tile), strict=True):
        images.append(policy.decode(sample_tile(policy, part, part_ids, seed, sampler).x_0).cpu())
    return torch.cat(images)


def generate_beside_pretrained(
    policy: Policy, text: Tensor, sample_id: Tensor, seed: int, sampler: Sampler, tile: int
) -> tuple[Tensor, float]:
    """The images of `generate`, and the KL in nats a picture from the policy's trajectories to the pretrained model's.

    The KL is estimated by the mean log P_F - log P_F,pretrained along the trajectories, which is unbiased; one more network call
    for each transition.
    """
    images, log_ratios = [], []
    for part, part_ids in zip(text.split(tile), sample_id.split(tile), strict=True):
        drawn = sample_tile(policy, part, part_ids, seed, sampler, has_prior=True)
        images.append(policy.decode(drawn.x_0).cpu())
        log_ratios.append((drawn.log_pf - drawn.log_pb).sum(1).cpu())
    return torch.cat(images), float(torch.cat(log_ratios).double().mean())


def noise_dtype(sampler: Sampler) -> torch.dtype:
    """The precision of the injected noise."""
    return torch.bfloat16 if sampler.noise_dtype == "bf16" else torch.float32
