"""What two levers change, measured on a model's own rollouts: rewards of x0_hat through cheaper decoders and strides, and
log-probabilities of chains stored in half precision.

Legend: N trajectories, T transitions.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dag.chain.rollout import CHAIN_DTYPES, Batch, SampledTile, Score, assemble, sample_tile
from dag.chain.trajectory import ChainStore, Trajectories
from dag.recipe import ForwardLooking, Recipe, is_scored
from dag.training.build import Components

Row = dict[str, Any]

_DECODERS = ("full", "half", "tiny")
_STRIDES = (1, 2, 4)


def previews(components: Components, recipe: Recipe, batch: Batch, score: Score) -> Iterator[Row]:
    """Every decoder and stride, read as in training, against the full VAE at every state, read exactly.

    In standard deviations of the final reward. At ("full", 1) what is left is how rewards with networks read previews.

    Rows have `bias` and `rms` of the difference over states and trajectories, both weighted by alpha_bar like the
    flow's reward, and `correlation` over the trajectories of a step, its mean over the steps. The components' policy has a
    tiny decoder.
    """
    drawn = sample_tile(
        components.policy,
        components.text[batch.prompt_id],
        batch.sample_id,
        recipe.seed,
        recipe.sampler,
        ForwardLooking(decoder="tiny"),
    )
    exact = _rewards_seen(components, drawn, score, "full", is_preview=False)
    seen = {decoder: _rewards_seen(components, drawn, score, decoder, is_preview=True) for decoder in _DECODERS}
    rows = torch.arange(len(batch.sample_id))
    scale = float(score(components.policy.decode(drawn.x_0), rows).std())
    T = components.policy.schedule.num_transitions
    weight = components.policy.schedule.alpha_bar_t[:T].cpu().float()
    for decoder, rewards in seen.items():
        for stride in _STRIDES:
            newest = [max(j for j in range(k + 1) if is_scored(j, T, stride)) for k in range(T)]
            used = rewards[:, newest]
            difference = weight * (used - exact) / scale
            yield {
                "decoder": decoder,
                "stride": stride,
                "bias": float(difference.mean()),
                "rms": float(difference.square().mean().sqrt()),
                "correlation": float(_correlation(used, exact).mean()),
            }


def _rewards_seen(
    components: Components, drawn: SampledTile, score: Score, decoder: str, *, is_preview: bool
) -> Tensor:
    """(N, T) rewards of x0_hat shown by a decoder, on the CPU."""
    rows = torch.arange(len(drawn.x_0))
    pictures = (components.policy.preview(x0_hat, decoder) for x0_hat in drawn.x0_hat.values())
    return torch.stack([score(images, rows, is_preview=is_preview) for images in pictures], 1).float().cpu()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """(T,) over the rows."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)


def storage(components: Components, recipe: Recipe, batch: Batch) -> Iterator[Row]:
    """Every dtype of a chain, log P_F taken at the stored state (ours) and at the unrounded one (published).

    Rows have the bytes of a stored trajectory and, for the policy that sampled it, the largest difference of log P_F
    (nats, sum over a state) between sampling and training, and of their ratio from 1 for sums and for means.
    """
    for dtype in CHAIN_DTYPES:
        for at in ("stored", "unrounded"):
            sampler = recipe.sampler.model_copy(update={"chain_dtype": dtype, "log_pf_at": at})
            text = components.text[batch.prompt_id]
            drawn = sample_tile(components.policy, text, batch.sample_id, recipe.seed, sampler, ForwardLooking())
            difference = (_log_pf_of(components, drawn.chain, text) - drawn.log_pf).double()
            dims = drawn.x_0[0].numel()
            yield {
                "chain": dtype,
                "log_pf_at": at,
                "bytes": round(_stored(components, recipe, batch, drawn).bytes_per_trajectory),
                "log_pf_error": float(difference.abs().max()),
                "ratio_error": float(difference.expm1().abs().max()),
                "ratio_error_of_means": float((difference / dims).expm1().abs().max()),
            }


@torch.no_grad()
def _log_pf_of(components: Components, chain: Tensor, text: Tensor) -> Tensor:
    """(N, T) of a stored chain, by the function that training calls."""
    policy, columns = components.policy, []
    schedule = policy.schedule
    for k in range(schedule.num_transitions):
        x_t, x_next, ks = chain[k], chain[k + 1], torch.full((chain.shape[1],), k, device=chain.device)
        prediction = policy.predict(x_t, schedule.timesteps[k].expand(len(x_t)), text)
        columns.append(
            schedule.transition_log_probs(x_t, x_next, prediction.branches, ks, prediction.guidance_scale).log_pf
        )
    return torch.stack(columns, 1)


def _stored(components: Components, recipe: Recipe, batch: Batch, drawn: SampledTile) -> Trajectories:
    """What the trainer would keep of a tile."""
    nothing = torch.zeros_like(drawn.log_pf)
    kept = assemble(drawn, nothing, nothing[:, 0], batch, recipe.seed, recipe.sampler)
    store = ChainStore(len(drawn.chain), len(batch.sample_id), drawn.chain.device, drawn.chain.device)
    store.put(drawn.chain)
    return Trajectories(**{**vars(kept), "chain": store.finish()})
