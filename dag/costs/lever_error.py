"""The errors of two levers, measured on a model's own rollouts.

`previews` measures rewards of x0_hat with cheaper decoders and strides, `storage` log-probabilities of chains that are stored
in half precision.

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
    """Yield one row for each decoder and stride: how far the rewards that training would use are from exact ones.

    Exact rewards score every state's x0_hat with the full VAE and the exact preprocessing of the reward network. What is left
    with the full decoder and stride 1 is the error of the faster preprocessing of previews.

    Rows have `bias` and `rms`, the mean and the root mean square of the difference over states and trajectories, in standard
    deviations of the final reward, weighted by alpha_bar as in the flow; and `correlation`, over the trajectories at a step,
    averaged over steps.

    Args:
        components: with a tiny decoder in the policy.
        score:      maps (images, rows of `batch`) to rewards.
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
    """Rewards (N, T) float32 of every x0_hat as this decoder shows it, on the CPU."""
    rows = torch.arange(len(drawn.x_0))
    pictures = (components.policy.preview(x0_hat, decoder) for x0_hat in drawn.x0_hat.values())
    return torch.stack([score(images, rows, is_preview=is_preview) for images in pictures], 1).float().cpu()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlations (T,) of the columns of a and b (N, T)."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)


def storage(components: Components, recipe: Recipe, batch: Batch) -> Iterator[Row]:
    """Yield one row for each dtype of a chain and each place where sampling takes log P_F.

    The places are the stored state (the default) and the state before rounding (as published). Rows have `bytes` of a stored
    trajectory and, with the policy unchanged, the largest differences between sampling and training: `log_pf_error` of log P_F
    (nats, summed over a state), `ratio_error` of the ratio P_F / P_F from 1, and `ratio_error_of_means`, the same for log P_F
    averaged over a state.
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
                "bytes": round(_stored(recipe, batch, drawn).bytes_per_trajectory),
                "log_pf_error": float(difference.abs().max()),
                "ratio_error": float(difference.expm1().abs().max()),
                "ratio_error_of_means": float((difference / dims).expm1().abs().max()),
            }


@torch.no_grad()
def _log_pf_of(components: Components, chain: Tensor, text: Tensor) -> Tensor:
    """log P_F (N, T) of a stored chain, recomputed by the function that training calls."""
    policy, columns = components.policy, []
    schedule = policy.schedule
    for k in range(schedule.num_transitions):
        x_t, x_next, ks = chain[k], chain[k + 1], torch.full((chain.shape[1],), k, device=chain.device)
        prediction = policy.predict(x_t, schedule.timesteps[k].expand(len(x_t)), text)
        columns.append(
            schedule.transition_log_probs(x_t, x_next, prediction.branches, ks, prediction.guidance_scale).log_pf
        )
    return torch.stack(columns, 1)


def _stored(recipe: Recipe, batch: Batch, drawn: SampledTile) -> Trajectories:
    """The trajectories that the trainer would store of a tile; rewards are zeros."""
    nothing = torch.zeros_like(drawn.log_pf)
    kept = assemble(drawn, nothing, nothing[:, 0], batch, recipe.seed, recipe.sampler)
    store = ChainStore(len(drawn.chain), len(batch.sample_id), drawn.chain.device, drawn.chain.device)
    store.put(drawn.chain)
    return Trajectories(**{**vars(kept), "chain": store.finish()})
