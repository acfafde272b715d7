"""The base of the rewards with a neural network: batches, exact or smooth pixels, moving between devices."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dag.errors import RunError
from dag.recipe.reward_sections import Tower
from dag.rewards.weights import State


class TowerReward(ABC):
    """A reward that scores pictures with a frozen network.

    By default it scores 8-bit pictures as the original code does, for which they are copied to CPU memory. With `is_preview`
    or `grad` it scores the tensors themselves, resized on their device. With `grad`, gradients reach the images and nothing
    else.
    """

    differentiable = True

    def __init__(self, section: Tower) -> None:
        self.max_batch, self.has_tf32 = section.max_batch, section.dtype == "tf32"

    def __call__(
        self, images: Tensor, prompts: Sequence[str], *, grad: bool = False, is_preview: bool = False
    ) -> Tensor:
        """(B,) float32 scores of (B, 3, H, W) images in [0, 1] for B prompts."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        size, smooth = self.max_batch, grad or is_preview
        # A preview is a guess at the picture, beside which the rounding of TF32 is small. In float32 the network would take a
        # quarter of a data-centre GPU's time.
        with torch.set_grad_enabled(grad), _tf32(self.has_tf32 or is_preview):
            parts = [
                self.score(images[i : i + size], prompts[i : i + size], smooth=smooth)
                for i in range(0, len(images), size)
            ]
        return torch.cat(parts) if parts else torch.zeros(0)

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        """(B,) float32 scores of at most `max_batch` pictures; `dag.rewards.pixels` says what `smooth` is."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move the network; scores are computed where it is."""


@contextmanager
def _tf32(is_on: bool) -> Iterator[None]:
    """A context in which, if `is_on`, GPUs multiply float32 matrices in TF32, with 10 bits of the factors' mantissas."""
    if not (is_on and torch.cuda.is_available()):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class LinearHead(nn.Module):
    """Float32 linear layers without activations between them: the last part of LAION's aesthetic predictor and of ImageReward.

    Args:
        key:   what errors call the file: the recipe's key.
        state: `layers.N.weight` and `layers.N.bias` of the published file; the numbers of its dropout layers are missing.
        width: width of the embedding that comes in.

    Raises:
        RunError: the layers do not fit.
    """

    def __init__(self, key: str, state: State, width: int) -> None:
        super().__init__()
        numbers = sorted({int(name.split(".")[1]) for name in state if _is_layer(name)})
        expected = {f"layers.{number}.{kind}" for number in numbers for kind in ("weight", "bias")}
        if not numbers or set(state) != expected:
            wrong = sorted(set(state) ^ expected)[:3]
            raise RunError(f"{key}: expected layers.N.weight and layers.N.bias alone; wrong: {wrong or 'no layer'}")
        shapes = [tuple(state[f"layers.{number}.weight"].shape) for number in numbers]
        if [width, *(rows for rows, _ in shapes)] != [*(columns for _, columns in shapes), 1]:
            raise RunError(f"{key}: layers {shapes} do not lead from the embedding's {width} numbers to one")
        self.layers = nn.Sequential(*(nn.Linear(columns, rows) for rows, columns in shapes))
        for layer, number in zip(self.layers, numbers, strict=True):
            kinds = ("weight", "bias")
            layer.load_state_dict({kind: state[f"layers.{number}.{kind}"].float() for kind in kinds})
        self.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """(B,) scores of (B, D) features of any dtype."""
        return self.layers(features.to(next(self.parameters()).dtype)).squeeze(-1)


def _is_layer(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[0] == "layers" and parts[1].isdecimal()
