"""What the trainer asks of a model family and of a reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from dag_kernels import combined
from torch import Tensor, nn

from dag.chain.schedule import Schedule


@dataclass(frozen=True)
class Prediction:
    """Network outputs at B states, of the schedule's prediction type."""

    rows: Tensor
    """(2B, C, H, W) unconditional, then conditional outputs, or (B, C, H, W) where there is nothing to combine; in the
    network's dtype."""
    num_samples: int
    """B"""
    guidance_scale: float
    conditional: Tensor
    """(B, C, H, W) the conditional branch alone; equal to `guided` without guidance."""

    @cached_property
    def guided(self) -> Tensor:
        """(B, C, H, W) float32 after classifier-free guidance: the policy's own output."""
        return combined(self.rows, self.num_samples, self.guidance_scale)


class Policy(Protocol):
    """A diffusion model as a forward policy P_F. One class per model family."""

    schedule: Schedule
    latent_shape: tuple[int, int, int]

    @property
    def text_width(self) -> int: ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(P, S, D) embeddings of prompts, on the CPU; the empty prompt's is kept for guidance."""
        ...

    def predict(
        self, x_t: Tensor, t: Tensor, text: Tensor, *, pretrained: bool = False, unguided: bool = False
    ) -> Prediction:
        """Outputs at x_t (B, C, H, W), t (B,), text (B, S, D).

        `pretrained` switches the adapter off; `unguided` leaves the unconditional branch out.
        """
        ...

    def decode(self, x_0: Tensor) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1]."""
        ...

    def preview(self, x0_hat: Tensor, decoder: str | None = None) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1] of predicted latents, for forward-looking rewards; perhaps cheaper.

        `decoder` is one of `forward_looking.decoder`; None takes the recipe's.
        """
        ...

    def trainable(self) -> list[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]:
        """Trainable weights by name, on the CPU."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def export(self, folder: Path) -> None:
        """Write the trained weights in the formats that other programs load."""
        ...

    def describe(self) -> dict[str, Any]:
        """What run.json says of the model."""
        ...


class Reward(Protocol):
    """(images (B, 3, H, W) float32 in [0, 1], B prompts) -> (B,) float32, finite, larger is better."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...
