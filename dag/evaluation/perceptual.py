"""Perceptual distances between pictures, by the packages that define them: LPIPS and DreamSim.

They are optional (`pip install -e ".[perceptual]"`): both need torchvision, and fetch their weights when first used.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dag.errors import RunError, UsageError

Distance = Callable[[Tensor, Tensor], Tensor]
"""Maps two batches (B, 3, H, W) in [0, 1] to () float32, the mean over the B pairs; 0 between equal pictures."""

_DREAMSIM_SIZE = 224
_PAIRS_AT_ONCE = 16


def load_distance(name: str, device: torch.device) -> Distance:
    """Load a perceptual distance by its name in DISTANCES.

    Raises:
        UsageError: its package is not installed.
        RunError:   its weights can be neither found nor fetched.
    """
    try:
        return DISTANCES[name](device)
    except ImportError as error:
        raise UsageError(f'--distance {name}: {error}; pip install -e ".[perceptual]"') from None
    except OSError as error:  # urllib's errors too
        raise RunError(f"--distance {name}: its weights could not be fetched: {error}") from None


def within_prompt_distance(distance: Distance, images: Tensor, images_per_prompt: int) -> float:
    """Mean distance between different pictures of the same prompt, averaged over prompts.

    Args:
        images: (P * n, 3, H, W) in [0, 1], the n pictures of a prompt next to each other.
    """
    pairs, total = torch.combinations(torch.arange(images_per_prompt)), 0.0
    for group in images.split(images_per_prompt):
        for first, second in (some.T for some in pairs.split(_PAIRS_AT_ONCE)):
            total += len(first) * float(distance(group[first], group[second]))
    return total * images_per_prompt / (len(pairs) * len(images))


def _lpips(device: torch.device) -> Distance:
    """LPIPS (Zhang et al., CVPR 2018) on AlexNet, the variant that its authors recommend for comparing pictures."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    @torch.no_grad()
    def distance(first: Tensor, second: Tensor) -> Tensor:
        return metric(first.to(device), second.to(device)).cpu()

    return distance


def _dreamsim(device: torch.device) -> Distance:
    """DreamSim (Fu et al., NeurIPS 2023) on OpenCLIP ViT-B/32.

    Not its default ensemble, which would run code fetched from a repository's main branch.
    """
    from dreamsim import dreamsim

    cache = Path(torch.hub.get_dir()) / "dreamsim"
    cache.mkdir(parents=True, exist_ok=True)
    model, _ = dreamsim(pretrained=True, device=str(device), cache_dir=str(cache), dreamsim_type="open_clip_vitb32")

    def read(images: Tensor) -> Tensor:
        """Resize as DreamSim's own preprocessing does, with Pillow's bicubic filter; clamped, since that overshoots."""
        size = (_DREAMSIM_SIZE, _DREAMSIM_SIZE)
        return functional.interpolate(images.to(device), size, mode="bicubic", antialias=True).clamp(0, 1)

    @torch.no_grad()
    def distance(first: Tensor, second: Tensor) -> Tensor:
        return model(read(first), read(second)).mean().cpu()

    return distance


DISTANCES: dict[str, Callable[[torch.device], Distance]] = {"lpips": _lpips, "dreamsim": _dreamsim}
