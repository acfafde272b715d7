"""What a run is trained on, in a few digits: two models with the same fingerprint are the same for a resumed run."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def of_weights(tensors: Iterable[Tensor]) -> str:
    """Of shapes and bits. Bits are summed as integers, which is exact in any order and on any device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(_SAME_WIDTH[tensor.element_size()])
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} {int(bits.sum(dtype=torch.int64))};".encode())
    return digest.hexdigest()[:16]


def of_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
