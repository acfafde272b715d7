"""What is stored of a rollout, and how the rest is recomputed from it.

A trajectory keeps its chain of states, a seed and a few scalars per step. The noise follows from the seed, and
the network's output at sampling time from two states and the noise, so neither is stored. The state *is* the
rounded stored value: log-probs are evaluated there and the next UNet call sees it.

Legend: N trajectories, B of them, T transitions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from dag_kernels import standard_normal
from torch import Tensor

from dag.chain.schedule import Schedule

# Steps of the counter-based noise above those of any chain.
_DRAWS = 1 << 31

Rows = slice | Tensor
"""B of a batch's trajectories: a slice, which needs no index tensor on the device, or their indices (B,)."""


def count(rows: Rows) -> int:
    """B, the number of rows."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def cut(rows: Rows, size: int) -> list[Rows]:
    """Split the rows into parts of at most `size`."""
    if isinstance(rows, Tensor):
        return list(rows.split(size))
    starts = range(rows.start, rows.stop, size)
    return [slice(start, min(start + size, rows.stop)) for start in starts]


def on_cpu(rows: Rows) -> Rows:
    """The rows as an index of tensors in CPU memory."""
    return rows.cpu() if isinstance(rows, Tensor) else rows


def as_index(rows: Rows) -> Tensor:
    """The rows as indices (B,) int64 on the CPU."""
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.cpu()


@dataclass(frozen=True)
class Trajectories:
    """N chains of one rollout. Log-probs are sums over latent dims, float32."""

    chain: Tensor
    """(T + 1, N, C, H, W) in the stored dtype, noisiest first; it may be in CPU memory, and is (0,) if no chain was kept."""
    log_pf: Tensor
    """(N, T) log P_F at sampling time."""
    log_pb: Tensor
    """(N, T) log P_B; with `objective.prior: pretrained` the pretrained model's log P_F (`dag.chain.rollout.against_prior`)."""
    x0_hat_reward: Tensor | None
    """(N, T) raw reward of the x0_hat of each state, or None without forward-looking."""
    reward: Tensor
    """(N,) raw reward of the final image."""
    prompt_id: Tensor
    """(N,) int64 on the CPU."""
    sample_id: Tensor
    """(N,) int64, unique over all epochs (`dag.chain.sample_ids`): with the seed and k it determines all noise."""
    seed: int
    noise_dtype: torch.dtype = torch.float32
    previews: Tensor | None = None
    """(N, S, C, H, W) float16 clean latents of some states and of the end, on the CPU, for the reward critic; None if they can
    be computed from the chain, or are not needed."""

    @property
    def num_trajectories(self) -> int:
        return len(self.sample_id)

    @property
    def bytes_per_trajectory(self) -> float:
        """Bytes of all stored tensors, divided by N."""
        stored = [getattr(self, field.name) for field in fields(self)]
        return sum(value.nbytes for value in stored if isinstance(value, Tensor)) / self.num_trajectories

    def without_states(self) -> "Trajectories":
        """The trajectories without their chains and previews, to free their memory."""
        return replace(self.without_chain(), previews=None)

    def without_chain(self) -> "Trajectories":
        """The trajectories with an empty chain, to free its memory."""
        return replace(self, chain=self.chain.new_empty(0))

    def to(self, device: torch.device) -> "Trajectories":
        """Move the scalars to the policy's device; `prompt_id` and the previews stay on the CPU, and the chain where it is."""
        return replace(
            self,
            log_pf=self.log_pf.to(device),
            log_pb=self.log_pb.to(device),
            x0_hat_reward=None if self.x0_hat_reward is None else self.x0_hat_reward.to(device),
            reward=self.reward.to(device),
            sample_id=self.sample_id.to(device),
        )

    def states(self, k: int | Tensor, rows: Rows) -> Tensor:
        """(B, C, H, W) states before step k, on the device of the scalars. If k is (B,), `rows` must be indices too."""
        chain_device = self.chain.device
        k = k.to(chain_device) if isinstance(k, Tensor) else k
        rows = rows.to(chain_device) if isinstance(rows, Tensor) else rows
        return self.chain[k, rows].to(self.log_pf.device)

    def noise(self, rows: Rows, k: int) -> Tensor:
        """(B, C, H, W) float32 noise that led from state k to state k + 1."""
        return draw_noise(self.seed, self.sample_id[rows], k, tuple(self.chain.shape[2:]), self.noise_dtype)

    def output_old(self, schedule: Schedule, rows: Rows, k: int) -> Tensor:
        """(B, C, H, W) float32 guided network output at sampling time, up to the rounding of the chain."""
        return schedule.output_of(self.states(k, rows), self.states(k + 1, rows), self.noise(rows, k), k)

    def x0_hat_old(self, schedule: Schedule, rows: Rows, k: int) -> Tensor:
        """(B, C, H, W) float32 x0_hat of state k at sampling time, up to the rounding of the chain."""
        return schedule.x0_hat(self.states(k, rows).float(), self.output_old(schedule, rows, k), k)


class ChainStore:
    """One buffer for the chains of a rollout, filled tile by tile.

    For tiles from a GPU, a buffer on the CPU is pinned, and copies to it run while the next tile is sampled.

    Args:
        num_states:       T + 1.
        num_trajectories: N.
        place:            the device of the buffer.
        source:           the device on which tiles are sampled.
    """

    def __init__(self, num_states: int, num_trajectories: int, place: torch.device, source: torch.device) -> None:
        self.num_states, self.num_trajectories, self.place, self.source = num_states, num_trajectories, place, source
        self.chain: Tensor | None = None
        self.filled = 0
        self.stream: torch.cuda.Stream | None = None

    def put(self, tile: Tensor) -> None:
        """Store the chains of the next B trajectories, (T + 1, B, C, H, W)."""
        if self.chain is None:
            shape = (self.num_states, self.num_trajectories, *tile.shape[2:])
            is_far = self.source.type == "cuda" and self.place.type == "cpu"
            self.chain = torch.empty(shape, dtype=tile.dtype, device=self.place, pin_memory=is_far)
            self.stream = torch.cuda.Stream(self.source) if is_far else None
        target = self.chain[:, self.filled : self.filled + tile.shape[1]]
        self.filled += tile.shape[1]
        if self.stream is None or tile.device.type == "cpu":
            target.copy_(tile)
            return
        self.stream.wait_stream(torch.cuda.current_stream(tile.device))
        with torch.cuda.stream(self.stream):
            # State by state: a copy to pinned memory is asynchronous only if source and target are contiguous.
            for state, place in zip(tile, target, strict=True):
                place.copy_(state, non_blocking=True)
        # Keeps the allocator from reusing the tile's memory while it is being copied.
        tile.record_stream(self.stream)

    def emptied(self) -> "ChainStore":
        """A new, empty store of the same size on the same devices."""
        return ChainStore(self.num_states, self.num_trajectories, self.place, self.source)

    def so_far(self) -> Tensor | None:
        """The chains stored so far, (T + 1, filled, C, H, W); None before the first tile."""
        if self.stream is not None:
            self.stream.synchronize()
        return None if self.chain is None else self.chain[:, : self.filled]

    def finish(self) -> Tensor:
        """The chains of all N trajectories, (T + 1, N, C, H, W); all must have been stored."""
        assert self.chain is not None and self.filled == self.num_trajectories
        if self.stream is not None:
            self.stream.synchronize()
        return self.chain


def draw_noise(seed: int, sample_id: Tensor, k: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(B, *shape) float32 counter-based noise of B samples at step k, rounded to `dtype`; bfloat16 is published."""
    return standard_normal(seed, sample_id, k, shape).to(dtype).float()


def draw_noise_anew(seed: int, sample_id: Tensor, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`draw_noise` for states that are noised once more while training; `number` counts these draws through all updates."""
    return draw_noise(seed, sample_id, _DRAWS + number % _DRAWS, shape, dtype)


def concatenate(parts: Sequence[Trajectories], chain: Tensor | None = None) -> Trajectories:
    """Join batches into one. `chain` is their joined chain if the caller has it; None joins the parts' own chains."""
    first = parts[0]
    if chain is None:
        chain = torch.cat([part.chain for part in parts], dim=1) if first.chain.ndim > 1 else first.chain
    joined: dict[str, Any] = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in fields(Trajectories)
        if field.name != "chain" and isinstance(getattr(first, field.name), Tensor)
    }
    return Trajectories(
        **{"x0_hat_reward": None, **joined}, chain=chain, seed=first.seed, noise_dtype=first.noise_dtype
    )
