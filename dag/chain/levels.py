"""Noise levels: signal a and noise s of a chain's states x = a x_0 + s eps, and the linear forms of x0_hat and eps_hat.

Diffusion models (Stable Diffusion, SDXL) keep a^2 + s^2 = 1, with a^2 = alphas_cumprod of their scheduler. Flow-matching models
(Stable Diffusion 3, FLUX) go along straight lines, a = 1 - s, and their network predicts the velocity eps - x_0.

Legend: N denoising steps.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "velocity")
_UNKNOWN_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "shift_terminal")


@dataclass(frozen=True)
class Levels:
    """The states of a chain of N steps, noisiest first; float64 on the CPU."""

    timesteps: Tensor
    """(N,) what the network is told of the state from which each step begins; int64 for a diffusion model."""
    signal: Tensor
    """(N + 1,) a, of the states before and after each step."""
    noise: Tensor
    """(N + 1,) s."""

    @classmethod
    def of_diffusion(cls, scheduler: Any, num_steps: int) -> "Levels":
        """The levels through which a DDIM or DDPM scheduler of diffusers goes.

        Args:
            scheduler: has `config`, `alphas_cumprod` and `set_timesteps`; it is not modified.
            num_steps: 1 .. num_train_timesteps.

        Raises:
            ValueError: too many steps, or timesteps that do not strictly decrease.
        """
        _check_steps(num_steps, int(scheduler.config.num_train_timesteps))
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(num_steps)
        timesteps = torch.as_tensor(scheduler.timesteps).to("cpu", torch.int64)
        if len(timesteps) != num_steps or not bool((timesteps[1:] < timesteps[:-1]).all()):
            raise ValueError(
                f"{type(scheduler).__name__} does not take {num_steps} strictly decreasing steps; "
                "convert it first: DDIMScheduler.from_config(scheduler.config)"
            )
        alpha_bars = _alphas_cumprod(scheduler)
        # The scheduler says what the noise level after the last step is; it is not that of t - 1000/N.
        last = _final_alpha_cumprod(scheduler, alpha_bars)
        return cls.of_alpha_bars(timesteps, torch.cat([alpha_bars[timesteps], last[None]]))

    @classmethod
    def of_alpha_bars(cls, timesteps: Tensor, alpha_bars: Tensor) -> "Levels":
        """The levels with a^2 = alpha_bars (N + 1,) and s^2 = 1 - a^2, for timesteps (N,)."""
        alpha_bars = alpha_bars.double()
        return cls(timesteps, alpha_bars.sqrt(), (1 - alpha_bars).sqrt())

    @classmethod
    def of_flow(cls, config: Mapping[str, Any], num_steps: int, tokens: int, shift: float | None = None) -> "Levels":
        """The levels of a flow-matching model: N equal steps of s from 1 to 0, shifted once towards the noise.

            s = e u / (1 + (e - 1) u),    u = 1, 1 - 1/N, ..., 1/N, 0

        FLUX's pipeline takes these levels. That of Stable Diffusion 3 by default shifts the smallest level twice, which makes the
        last step but one a very hard one; it takes ours with `sigmas=numpy.linspace(1, 1 / N, N)`.

        Args:
            config: of a FlowMatchEulerDiscreteScheduler.
            tokens: of a picture inside the network, on which the shift of some models depends.
            shift:  e; None takes the scheduler's.

        Raises:
            ValueError: too many steps, or a grid of another kind.
        """
        scale = int(config.get("num_train_timesteps", 1000))
        _check_steps(num_steps, scale)
        if strange := [key for key in _UNKNOWN_GRIDS if config.get(key)]:
            raise ValueError(
                f"the scheduler's {strange[0]} is not known here; set it to false in scheduler_config.json"
            )
        e = _shift(config, tokens) if shift is None else shift
        u = torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
        noise = e * u / (1 + (e - 1) * u)
        return cls(scale * noise[:-1], 1 - noise, noise)


def noising(levels: Levels) -> tuple[Tensor, Tensor]:
    """(r, c) of every step, (N,) each: P_B = N(r x_next, c^2 I), with r = a_t / a_next and c^2 = s_t^2 - r^2 s_next^2."""
    r = levels.signal[:-1] / levels.signal[1:]
    return r, (levels.noise[:-1] ** 2 - r**2 * levels.noise[1:] ** 2).clamp(min=0).sqrt()


def _shift(config: Mapping[str, Any], tokens: int) -> float:
    """The factor e by which a flow-matching scheduler shifts its levels for a picture of so many tokens."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - least) / (most - least)
    return float(mu) if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


def x0_coefficients(prediction_type: str, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(x0_x, x0_output) of x0_hat = x0_x x_t + x0_output o, o the network's output, shaped like the levels.

    Raises:
        ValueError: an unknown type, or one that does not tell x_0 at these levels.
    """
    if prediction_type == "epsilon":
        if bool((signal == 0).any()):
            raise ValueError(
                "a zero-terminal-SNR schedule cannot be walked with epsilon prediction; use a v-prediction model"
            )
        return 1 / signal, -noise / signal
    if prediction_type == "v_prediction":
        return signal, -noise
    if prediction_type == "sample":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction_type == "velocity":
        return 1 / (signal + noise), -noise / (signal + noise)
    raise ValueError(f"prediction_type {prediction_type!r} is not known; known: {', '.join(PREDICTION_TYPES)}")


def eps_coefficients(prediction_type: str, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(eps_x, eps_output) of eps_hat = eps_x x_t + eps_output o, shaped like the levels, for a known prediction type."""
    if prediction_type == "epsilon":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction_type == "v_prediction":
        return noise, signal
    if prediction_type == "velocity":
        return 1 / (signal + noise), signal / (signal + noise)
    return 1 / noise, -signal / noise


def _check_steps(num_steps: int, num_train: int) -> None:
    if not 1 <= num_steps <= num_train:
        raise ValueError(
            f"sampler.steps={num_steps}: this model was trained on {num_train} steps; use 1 to {num_train}"
        )


def _alphas_cumprod(scheduler: Any) -> Tensor:
    """alphas_cumprod in float64. Where the betas follow a known formula they are computed anew: diffusers rounds to float32."""
    config, betas = scheduler.config, None
    if not config.get("rescale_betas_zero_snr") and config.get("trained_betas") is None:
        start, end, steps = config.beta_start, config.beta_end, config.num_train_timesteps
        if config.beta_schedule == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        elif config.beta_schedule == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
    return scheduler.alphas_cumprod.double() if betas is None else torch.cumprod(1 - betas, 0)


def _final_alpha_cumprod(scheduler: Any, alpha_bars: Tensor) -> Tensor:
    """alpha_bar after the last step: alphas_cumprod[0] if the scheduler has set_alpha_to_one=False, else 1."""
    keeps_noise = scheduler.config.get("set_alpha_to_one") is False
    return alpha_bars[0] if keeps_noise else torch.ones((), dtype=torch.float64)
