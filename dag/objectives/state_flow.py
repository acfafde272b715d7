"""The state flow log F~_phi(x_t, t, prompt): one number per noisy latent.

    log F~(x_t) = c_k + a_k (|x_t|^2 / D - 1) + s * net(x_t, t, prompt)        D = C * H * W

The constants c_k, one per step, hold what a network would learn slowly: the mean of log P_F - log P_B, tens to thousands of
nats, which depends on the step alone. They are set from rollouts (`dag.objectives.transition.constant_shift`). s is the spread
of the residuals when the constants were first set, so that the network predicts numbers of order one.

The slopes a_k, one per step, are optional (`flow.slopes`). Without a prior, log P_F - log P_B has a noise that is largely a
function of |x_t|^2: sqrt(D) nats at the noisy steps. They too are set from rollouts (`dag.objectives.transition.slope_shift`).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Stage(nn.Module):
    """Halves the side; the embedding of timestep and prompt scales and shifts the normalised features."""

    def __init__(self, width_in: int, width: int, embedding: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width_in, width, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(math.gcd(8, width), width)
        self.modulate = nn.Linear(embedding, 2 * width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        h = self.down(h)
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        modulated = functional.silu(self.norm(h) * (1 + scale) + shift)
        return h + self.mix(modulated)


def norm_excess(x: Tensor) -> Tensor:
    """(B,) float32 |x|^2 / D - 1 of states (B, C, H, W) in any dtype.

    1 is the mean square of the noise that every chain begins with, and about that of all states of a variance-preserving chain.
    What is left of their mean goes into the constants, which are set after the slopes, so the centring does not change the fit.
    A fixed one needs no state of its own, and c_k stays close to the mean of log F~.
    """
    return x.float().square().mean((1, 2, 3)) - 1


class StateFlow(nn.Module):
    """The network, the constants and the slopes that give log F~ of B states.

    Args:
        latent_channels: C of the latent.
        text_width:      D of the prompt embeddings.
        num_transitions: T, the number of per-step constants.
        channels:        width of each stage.
        has_slopes:      whether there are per-step slopes.
    """

    constants: Tensor
    """(T,) c_k."""
    slopes: Tensor | None
    """(T,) a_k; None without slopes, so that checkpoints hold them for the runs that have them and no others."""
    scale: Tensor
    """() s."""

    def __init__(
        self,
        latent_channels: int,
        text_width: int,
        num_transitions: int,
        channels: tuple[int, ...],
        has_slopes: bool = False,
    ) -> None:
        super().__init__()
        width = channels[-1]
        self.embedding_width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.text = nn.Linear(text_width, width)
        self.pick_token = nn.Linear(text_width, 1)
        self.stages = nn.ModuleList(
            _Stage(before, after, width) for before, after in zip((latent_channels, *channels), channels, strict=False)
        )
        last = nn.Linear(width, 1)
        # Zeros, so that log F~ starts as the constants alone: an arbitrary flow would first have to be unlearnt.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.SiLU(), last)
        self.register_buffer("constants", torch.zeros(num_transitions))
        self.register_buffer("slopes", torch.zeros(num_transitions) if has_slopes else None)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x_t: Tensor, t: Tensor, k: Tensor, text: Tensor) -> Tensor:
        """(B,) float32 log F~.

        Args:
            x_t:  (B, C, H, W), any dtype.
            t:    (B,) timesteps.
            k:    (B,) int64 transition indices.
            text: (B, S, D) prompt embeddings.
        """
        text = text.float()
        attention = self.pick_token(text).softmax(dim=1)  # (B, S, 1)
        embedding = self.time(_sinusoidal(t, self.embedding_width)) + self.text((attention * text).sum(1))
        h = x_t.float()
        for stage in self.stages:
            h = stage(h, embedding)
        features = torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1)
        learnt = self.scale * self.head(features).squeeze(-1)
        if self.slopes is None:
            return self.constants[k] + learnt
        return self.constants[k] + self.slopes[k] * norm_excess(x_t) + learnt


def _sinusoidal(t: Tensor, width: int) -> Tensor:
    """(B, width) Fourier features of the timesteps (B,), with periods from 2 pi to 2 pi 10^4 timesteps."""
    half = (width + 1) // 2
    frequencies = torch.exp(-math.log(10_000.0) / half * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)[:, :width]
