"""Vectors times Jacobians of the denoiser."""

import torch
from torch import Tensor


def backwards(output: Tensor, x: Tensor, vector: Tensor, *, keeps_graph: bool = False) -> Tensor:
    """(B, C, H, W) float32 (d output / d x)^T vector.

    Args:
        output:      (B, C, H, W) what a network made of x, with its graph.
        x:           (B, C, H, W) a leaf that requires a gradient.
        vector:      (B, C, H, W) float32.
        keeps_graph: the graph is needed again.
    """
    # Scaled to order one, so that a denoiser in half precision neither overflows nor rounds to zero.
    size = vector.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    (product,) = torch.autograd.grad(output, x, (vector / size).to(output.dtype), retain_graph=keeps_graph)
    return size * product.float()
