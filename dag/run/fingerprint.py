"""Fingerprints of a run's base model and prompts, by which a resumed run recognises that they have not changed."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def of_weights(tensors: Iterable[Tensor]) -> str:
    """Fingerprint of the shapes and bits of tensors. Bits are summed as integers: the sum is exact in any order on any device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(_SAME_WIDTH[tensor.element_size()])
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} {int(bits.sum(dtype=torch.int64))};".encode())
    return digest.hexdigest()[:16]


def of_texts(texts: Sequence[str]) -> str:
    """Fingerprint of texts and their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
