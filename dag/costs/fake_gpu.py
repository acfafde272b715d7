"""The meta device in the place of a GPU: counts what code would ask of a GPU, and refuses what a GPU would refuse.

On the meta device tensors have shapes and no values. Each operator and each fused kernel counts as one kernel launch: a
library may start several for one operator, and a compiled graph fewer. Where Python reads a tensor's value, that counts as
one copy to the host, which on a GPU waits for it; every value that is read is 1.
"""

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dag.costs.live_bytes import tensors_in

# Operators that return a tensor without starting a kernel, besides views.
_WITHOUT_KERNEL = {"aten::detach", "aten::_unsafe_view", "aten::lift_fresh", "aten::alias", "aten::_reshape_alias"}
# Operators that may index a tensor of the device by indices on the host, at the price of a copy.
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_HERE = Path(__file__).parents[1]


class DeviceMismatchError(RuntimeError):
    """An operator got tensors of the host and of the device; with a GPU PyTorch refuses that too."""


@dataclass
class Counts:
    """What has been asked of the device so far."""

    kernels: Counter[str] = field(default_factory=Counter)
    """Launches by part of the loop."""
    host_copies: Counter[str] = field(default_factory=Counter)
    """Copies between host and device, in either direction, by the file and function that makes them."""

    def __sub__(self, earlier: "Counts") -> "Counts":
        return Counts(self.kernels - earlier.kernels, self.host_copies - earlier.host_copies)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.kernels + other.kernels, self.host_copies + other.host_copies)

    def copy(self) -> "Counts":
        return Counts(self.kernels.copy(), self.host_copies.copy())


class FakeGpu(TorchDispatchMode):
    """Treats the meta device as a GPU: counts launches and copies, and refuses to mix devices. Values that are read are 1.

    Attributes:
        counts: what has been asked of the device so far.
        part:   the part of the loop that launches are counted for.
        marks:  the counts at each call of `mark`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.part = Counts(), "rest"
        self.marks: list[Counts] = []

    def mark(self, *_: object) -> None:
        """Store a copy of the counts in `marks`; takes any arguments, so that it can serve as a callback."""
        self.marks.append(self.counts.copy())

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Count the kernels inside the `with` block for `part`; of nested parts the innermost counts."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Replace the method `name` of `owner` by one whose kernels count for `part`."""
        call = getattr(owner, name)

        @wraps(call)
        def watched(*arguments: Any, **options: Any) -> Any:
            with self.inside(part):
                return call(*arguments, **options)

        setattr(owner, name, watched)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        tensors = tensors_in((args, kwargs))
        if name == "aten::_local_scalar_dense" and args[0].is_meta:
            self._copied()
            return torch.ones((), dtype=args[0].dtype).item()
        if name == "aten::_to_copy" and args[0].is_meta and _device(kwargs) == "cpu":
            self._copied()
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "aten::copy_" and args[1].is_meta and not args[0].is_meta:
            self._copied()
            return args[0].fill_(1)
        on_host = [tensor for tensor in tensors if not tensor.is_meta and (tensor.dim() or name in _INDEXING)]
        if on_host and any(tensor.is_meta for tensor in tensors):
            self._check_mixture(name, tensors)
        elif name == "aten::_to_copy" and on_host and _device(kwargs) == "meta":
            self._copied()
        result = func(*args, **kwargs)
        if _starts_kernel(func, name, tensors_in(result) or tensors):
            self.counts.kernels[self.part] += 1
        return result

    def _check_mixture(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Count a call with tensors of host and device as a copy. Raises DeviceMismatchError if a GPU would refuse it."""
        is_indexed = name in _INDEXING and tensors[0].is_meta
        if not is_indexed and name != "aten::copy_":
            raise DeviceMismatchError(f"{name} of {', '.join(f'{tuple(t.shape)} on {t.device}' for t in tensors)}")
        self._copied()

    def _copied(self) -> None:
        """Count a copy between host and device for the innermost function of ours that led to it."""
        ours = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(_HERE)]
        # Without this file and other modes through which the operator came here.
        frames = [frame for frame in ours if frame.filename != __file__ and frame.name != "__torch_dispatch__"]
        at = f"{Path(frames[-1].filename).relative_to(_HERE.parent)}:{frames[-1].name}" if frames else "elsewhere"
        self.counts.host_copies[at] += 1


def _device(kwargs: dict[str, Any]) -> str | None:
    return torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None


def _starts_kernel(func: Any, name: str, touched: Sequence[Tensor]) -> bool:
    if func.is_view or name in _WITHOUT_KERNEL or "empty" in name:
        return False
    return any(tensor.is_meta for tensor in touched)
