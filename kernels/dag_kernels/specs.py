"""A specification of each fused operation: how to make inputs, which gradients it has, and the bytes that it moves.

Tests and benchmark build their inputs from it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dag_kernels import reference

Inputs = dict[str, Any]
Shape = tuple[int, ...]

LATENT = (4, 64, 64)
# A micro-batch on a 24 GB GPU, a tile, and enough samples to fill a GPU.
CASES = ((3, LATENT, True), (8, LATENT, False), (64, LATENT, True))
# The finest and the coarsest map of Stable Diffusion 1.5's UNet for a micro-batch of 4 with guidance, and the VAE's largest.
NORM_CASES = ((8, (320, 64, 64), True), (8, (1280, 8, 8), False), (4, (128, 512, 512), True))


@dataclass(frozen=True)
class OpSpec:
    """What tests and benchmark need to know about one fused operation."""

    name: str
    """The function's name in `dag_kernels.reference` and in `Kernels`."""
    make: Callable[[int, Shape, torch.dtype, torch.device, int], Inputs]
    """Maps (B, latent shape, dtype, device, seed) to keyword arguments."""
    gradients: tuple[str, ...]
    """Names of the inputs that get a gradient."""
    bytes_moved: Callable[[int, Shape, torch.dtype], tuple[int, int]]
    """Maps (B, latent shape, dtype) to the bytes (forward, backward) of one fused pass, which reads and writes all once."""
    module: str
    """The module of `dag_kernels` with the Triton kernel."""
    cases: tuple[tuple[int, Shape, bool], ...] = CASES
    """What is timed: (B, shape of a sample, whether the compiled reference is timed too)."""

    def reference(self) -> Callable[..., Any]:
        """The operation in plain PyTorch."""
        return getattr(reference, self.name)


def step_table(num_steps: int, device: torch.device, seed: int) -> Tensor:
    """Random coefficients (num_steps, 7), of the size that those of a 50-step DDPM chain have."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_steps, 7, generator=generator)
    # mean_x, mean_output, sigma, noising_x, noising_std, x0_x, x0_output
    low = torch.tensor([0.95, -0.4, 0.05, 0.9, 0.1, 1.0, -2.0])
    high = torch.tensor([1.1, -0.1, 0.3, 0.999, 0.4, 3.0, -0.1])
    return (low + (high - low) * uniform).to(device)


def _latents(B: int, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, *shape, generator=generator).to(device, dtype) for _ in range(count)]


def _transition_inputs(B: int, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    x_t, noise, uncond, cond, ref, old = _latents(B, shape, dtype, device, seed, 6)
    table, k = step_table(50, device, seed), torch.arange(B, device=device) % 50
    # x_next is within a few sigma of the mean, like a sampled state.
    output = torch.cat([uncond, uncond + 0.1 * cond])
    o = reference.combined(output.double(), B, 5.0)
    coefficients = [c.reshape(-1, *([1] * len(shape))) for c in table.double()[k, :5].unbind(1)]
    x_next = coefficients[0] * x_t.double() + coefficients[1] * o + coefficients[2] * noise.double()
    return {
        "x_t": x_t,
        "x_next": x_next.to(dtype),
        "output": output,
        "table": table,
        "k": k,
        "guidance_scale": 5.0,
        "output_ref": (o + 0.1 * ref.double()).to(dtype),
        "output_old": (o + 0.1 * old.double()).to(dtype),
    }


def _transition_bytes(B: int, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    elements = B * math.prod(shape) * dtype.itemsize
    return 6 * elements, 8 * elements


def _sampling_inputs(B: int, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    x_t, uncond, cond = _latents(B, shape, dtype, device, seed, 3)
    return {
        "x_t": x_t,
        "output": torch.cat([uncond, uncond + 0.1 * cond]),
        "table": step_table(50, device, seed),
        "k": 17,
        "seed": (1 << 63) + seed,
        "sample_id": (1 << 40) + torch.arange(B, device=device),
        "guidance_scale": 5.0,
        "chain_dtype": dtype,
    }


def _sampling_bytes(B: int, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    return B * math.prod(shape) * (4 * dtype.itemsize + 4), 0


def _balance_inputs(B: int, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randn(B, generator=generator).to(device) for _ in range(9)]
    log_F, log_pf, log_pb, log_F_next, log_looking, log_looking_next, log_reward, scale, weight = columns
    return {
        "log_F": 100 * log_F,
        "log_pf": 100 * log_pf - 2e4,
        "log_pb": 100 * log_pb - 2e4,
        "log_F_next": 100 * log_F_next,
        "log_looking": 20 * log_looking,
        "log_looking_next": 20 * log_looking_next,
        "log_reward": 20 * log_reward,
        # Every third transition is the last of its chain.
        "is_terminal": torch.arange(B, device=device) % 3 == 2,
        "scale": 50 + 10 * scale.abs(),
        "policy_weight": weight.abs(),
        "huber": 3.0,
        "detach_next": False,
    }


def _balance_bytes(B: int, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    return B * (9 * 4 + 1 + 5 * 4), B * (4 + 3 * 4 + 3 * 4)


def _norm_inputs(B: int, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator, C = torch.Generator().manual_seed(seed), shape[0]
    weight, bias = (torch.randn(C, generator=generator).to(device, dtype) for _ in range(2))
    # Channels of different means and sizes, as a network's are.
    scale, mean = ((1 + torch.arange(C)) / C).reshape(C, 1, 1), torch.randn(C, 1, 1, generator=generator)
    x = (mean + scale * torch.randn(B, *shape, generator=generator)).to(device, dtype)
    groups = math.gcd(C, 32) if C > 32 else math.gcd(C, 2)
    return {
        "x": x.contiguous(memory_format=torch.channels_last),
        "weight": weight,
        "bias": bias,
        "groups": groups,
        "eps": 1e-5,
        "has_silu": True,
    }


def _norm_bytes(B: int, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    elements = B * math.prod(shape) * dtype.itemsize
    return 2 * elements, 3 * elements


OPS = {
    spec.name: spec
    for spec in (
        OpSpec("transition_log_probs", _transition_inputs, ("output",), _transition_bytes, "transition"),
        OpSpec("sampling_step", _sampling_inputs, (), _sampling_bytes, "sampling"),
        OpSpec("detailed_balance", _balance_inputs, ("log_F", "log_pf", "log_F_next"), _balance_bytes, "balance"),
        OpSpec("group_norm", _norm_inputs, ("x",), _norm_bytes, "group_norm", NORM_CASES),
    )
}
