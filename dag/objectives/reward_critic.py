"""The reward critic: a small network that learns the reward of a clean latent and its prompt.

Rewards such as a JPEG's size or a server's score have no gradient. The critic is fitted to the rewards of predicted latents, of
which a rollout scores one for each state, and its gradient takes the place of theirs.

Legend: B samples, P prompts, S text tokens, W text width.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

# Features are pooled when a stage has brought the latent's side down to about this.
_POOLED_SIDE = 8


class _Block(nn.Module):
    """A convolution whose input is added to its output; the prompt scales and shifts its features."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.modulate = nn.Linear(text_width, 2 * width)
        # The prompt starts without effect, and gets as much as the rewards show.
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, h: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.modulate(text)[:, :, None, None].chunk(2, dim=1)
        return h + functional.silu(self.mix(h) * (1 + scale) + shift)


class RewardCritic(nn.Module):
    """The critic's network.

    Convolutions halve the latent's side until it is about 8. The means and standard deviations of the features over the picture
    then give the reward by two linear layers: a reward is mostly a property of the picture, wherever its parts are.

    Args:
        latent_shape: (C, H, W).
        text:         (P, S, W) embeddings of all prompts, on the CPU; their means over the tokens are standardised over the
            prompts, which else are almost equal.
        width:        channels.
    """

    prompts: Tensor
    """(P, W) standardised embeddings."""

    def __init__(self, latent_shape: tuple[int, int, int], text: Tensor, width: int) -> None:
        super().__init__()
        channels, side = latent_shape[0], min(latent_shape[1:])
        stages = max(1, round(math.log2(side / _POOLED_SIDE)))
        pooled = text.float().mean(1)
        spread = pooled.std(0, correction=0)
        self.register_buffer("prompts", (pooled - pooled.mean(0)) / spread.clamp(min=1e-3), persistent=False)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width, text.shape[2]) for _ in range(stages + 1))
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(stages))
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, latents: Tensor, prompt_id: Tensor) -> Tensor:
        """(B,) float32 rewards, standardised as the critic's targets are.

        Args:
            latents:   (B, C, H, W) clean latents, any dtype.
            prompt_id: (B,) int64 on the latents' device.
        """
        text = self.prompts[prompt_id]
        h = self.blocks[0](functional.silu(self.first(latents.float())), text)
        for down, block in zip(self.down, self.blocks[1:], strict=True):
            h = cast(Tensor, block(functional.silu(down(h)), text))
        spread = (h.var((2, 3), correction=0) + 1e-4).sqrt()
        return self.head(torch.cat([h.mean((2, 3)), spread], dim=1)).squeeze(-1)
