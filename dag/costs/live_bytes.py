"""Counts the bytes of live tensors, operator by operator; on the meta device nothing is computed.

Also makes code on the meta device hold the tensors that it would hold on CUDA. Knows no model.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN, _LAST = torch.ops.aten, torch.channels_last
_NESTED = (tuple, list, dict)
# Dispatching here, below autograd, reaches PyTorch's own definition of an operator that `as_on_cuda` replaces.
_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors, at present and at their peak.

    A storage counts once, however many views it has, from the operator that returned it until its last reference is gone;
    references of autograd and references after the `with` block count too. Storages that existed before count if they were
    given to `include`. The mode can be entered again, and keeps no tensor alive.

    Not counted: what an operator allocates and frees inside itself (a convolution's workspace, and outside `as_on_cuda` its
    change of memory format; the fp32 accumulator of flash attention's backward pass, of which `deterministic: true` takes
    several; under `torch.inference_mode` also the steps of a composite operator), what the allocator rounds up or leaves
    unused, and a change of a storage's size.

    Args:
        device_type: count the tensors of this type of device alone, e.g. "meta"; None counts all.

    Attributes:
        current: bytes alive now.
        peak:    the highest `current` so far.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        self.current = 0
        self.peak = 0
        # By id: Python reuses an id only after the weak reference's callback has removed it here.
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def include(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that exist already, such as weights; returns the bytes that were not counted before."""
        before = self.current
        for tensor in tensors:
            self._count(tensor.untyped_storage())
        return self.current - before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # A view of an argument is no new storage: a weight counts only if it was given to `include`.
        known = {id(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if id(storage) not in known:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive or self.device_type not in (None, storage.device.type):
            return

        def freed(_: object) -> None:
            del self._alive[key]
            self.current -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.current += size
        self.peak = max(self.peak, self.current)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, meta tensors use the kernels of CUDA; other devices are unaffected. Cannot be nested.

    PyTorch gives meta tensors its reference implementation of attention, which holds the attention matrices in fp32.
    Here they get the memory-efficient kernel, which holds what flash attention holds. Attention with a mask is left alone, and
    so is autocast, which the policy does not use. Convolutions get the memory layouts of cuDNN.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
    try:
        with _CudnnLayouts():
            yield
    finally:
        # What a library registers is removed when the library is deleted.
        del library


class _CudnnLayouts(TorchDispatchMode):
    """Gives convolutions of meta tensors the memory layouts of cuDNN, whose copies are then counted.

    If the input or the weight is channels-last, cuDNN computes in that layout: it copies what it reads in another one, and
    returns channels-last tensors, which a norm in turn copies and keeps. PyTorch's meta kernels return other layouts.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATEN.convolution.default:
            x, weight, read = args[0], args[1], args[:2]
        elif func is _ATEN.convolution_backward.default:
            # The gradient to the input reads the weight, that to the weight reads the input.
            (upstream, x, weight), mask = args[:3], args[10]
            read = (upstream, *([weight] if mask[0] else []), *([x] if mask[1] else []))
        else:
            return func(*args, **kwargs)
        if not x.is_meta or x.dim() != 4 or _LAST not in map(suggest_memory_format, (x, weight)):
            return func(*args, **kwargs)
        others = [tensor for tensor in read if not tensor.is_contiguous(memory_format=_LAST)]
        copies = [torch.empty_like(tensor, memory_format=_LAST) for tensor in others]
        result = func(*args, **kwargs)
        del copies
        return _channels_last(result) if isinstance(result, Tensor) else tuple(map(_channels_last, result))


def _channels_last(result: Tensor | None) -> Tensor | None:
    """The same storage as a channels-last tensor, if there are channels."""
    if result is None or result.dim() != 4:
        return result
    _, C, H, W = result.shape
    return result.as_strided(result.shape, (C * H * W, 1, W * C, C))


def peak_of(call: Callable[[], object], existing: Iterable[Tensor] = ()) -> int:
    """Bytes alive at the peak of a call, `existing` tensors (weights, inputs) included.

    Tensors on the meta device are treated as on CUDA; see `as_on_cuda`.
    """
    with LiveBytes() as live, as_on_cuda():
        live.include(existing)
        call()
    return live.peak


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among an operator's arguments or results, which are nested in tuples, lists and dicts alone."""
    if isinstance(tree, Tensor):
        return [tree]
    if not isinstance(tree, _NESTED):
        return []
    found: list[Tensor] = []
    for part in tree.values() if isinstance(tree, dict) else tree:
        # Tensors are told here and not by a call each: millions of arguments are looked at for a forecast.
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, _NESTED):
            found += tensors_in(part)
    return found


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of meta tensors (B, heads, tokens, width) that does not hold the (tokens, tokens) matrices."""
    if mask is not None or enable_gqa:
        return _ATEN.scaled_dot_product_attention.default.redispatch(
            _META, query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    # Like flash attention, which returns the log-sum-exp of each row even where no backward pass will need it.
    options = {"compute_log_sumexp": True, "dropout_p": dropout, "is_causal": is_causal, "scale": scale}
    return _ATEN._scaled_dot_product_efficient_attention(query, key, value, None, **options)[0]
