"""The rows of the benchmark: each fused operation against plain PyTorch, eager and compiled, on one GPU.

A fused operation is timed only if it is right (`dag_kernels.verify`) on the inputs of the row. If something fails, the row
has `error` in place of its figures, and the next row follows.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dag_kernels import choose
from dag_kernels.specs import Inputs, OpSpec
from dag_kernels.verify import check

Row = dict[str, Any]

DTYPE = torch.bfloat16
PROVIDERS = ("eager", "compiled", "fused")


def bandwidth(device: torch.device) -> float:
    """GB/s of copying 1 GiB on the device, counting bytes read and written. The memory is freed again."""
    gb_s = _copied_gb_s(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return gb_s


def _copied_gb_s(device: torch.device) -> float:
    source = torch.empty(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _quantiles(lambda: target.copy_(source))[1] / 1e6


def rows_of(spec: OpSpec, device: torch.device, copy_gb_s: float, chosen: Sequence[str] = PROVIDERS) -> Iterator[Row]:
    """Yield every row of an operation with the chosen providers; a row that failed has `error` in place of its figures.

    Args:
        copy_gb_s: the device's copy bandwidth, from `bandwidth`.
    """
    modes = ("forward", "both") if spec.gradients else ("forward",)
    for B, shape, with_compiled in spec.cases:
        providers = [name for name in chosen if with_compiled or name != "compiled"]
        for provider, mode in itertools.product(providers, modes):
            row: Row = {"op": spec.name, "provider": provider, "mode": mode}
            row |= {"dtype": str(DTYPE).removeprefix("torch."), "B": B, "shape": "x".join(map(str, shape))}
            try:
                inputs = spec.make(B, shape, DTYPE, device, 0)
                row |= _figures(spec, _provider(spec, provider, inputs, device), mode, inputs, B, shape, copy_gb_s)
            except AssertionError as error:
                row["error"] = f"wrong, hence not timed: {error}"
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
            yield row


def _provider(spec: OpSpec, provider: str, inputs: Inputs, device: torch.device) -> Callable[..., Any]:
    """The operation of one provider. Raises AssertionError if the fused one is wrong on these inputs."""
    if provider == "eager":
        return spec.reference()
    if provider == "compiled":
        # Without a reset PyTorch compiles a function for a few shapes only, and silently runs further shapes eagerly.
        torch._dynamo.reset()
        return torch.compile(spec.reference(), dynamic=False)
    kernels = choose("triton", device)
    check(spec, inputs, kernels)
    return getattr(kernels, spec.name)


def _figures(
    spec: OpSpec,
    op: Callable[..., Any],
    mode: str,
    inputs: Inputs,
    B: int,
    shape: tuple[int, ...],
    copy_gb_s: float,
) -> Row:
    call = _call(spec, op, inputs, mode == "both")
    low, middle, high = _quantiles(call)
    forward, backward = spec.bytes_moved(B, shape, DTYPE)
    gb_s = (forward + (backward if mode == "both" else 0)) / middle / 1e6
    return {
        "us_p20": round(1e3 * low, 2),
        "us_p50": round(1e3 * middle, 2),
        "us_p80": round(1e3 * high, 2),
        "gb_s": round(gb_s, 1),
        "percent_of_copy": round(100 * gb_s / copy_gb_s, 1),
        "peak_mib": round(_peak_mib(call), 2),
        "launches": _launches(call),
    }


def _call(spec: OpSpec, op: Callable[..., Any], inputs: Inputs, with_backward: bool) -> Callable[[], object]:
    """A call of the operation; with backward also all its gradients, from upstream gradients of one."""
    inputs = dict(inputs)
    if not with_backward:
        return lambda: op(**inputs)
    leaves = []
    for name in spec.gradients:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
        leaves.append(inputs[name])

    def both() -> object:
        outputs = [value for value in op(**inputs) if value is not None and value.requires_grad]
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(value) for value in outputs])

    return both


def _quantiles(call: Callable[[], object]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles in milliseconds, caches flushed between calls."""
    from triton.testing import do_bench

    low, middle, high = do_bench(call, quantiles=[0.2, 0.5, 0.8])
    return low, middle, high


def _peak_mib(call: Callable[[], object]) -> float:
    """Peak MiB that one call allocates beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that one call starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in recorded.events())


def shown(row: Mapping[str, Any]) -> str:
    """A row as one line to print."""
    case = f"{row['op']:22} {row['provider']:9} {row['mode']:8} {row['dtype']:9} {row['B']:5} x {row['shape']:9} "
    if "error" in row:
        return f"{case} not measured: {row['error']}"
    return (
        f"{case} {row['us_p50']:10.2f} us  {row['gb_s']:8.1f} GB/s {row['percent_of_copy']:6.1f} %  "
        f"{row['peak_mib']:9.2f} MiB  {row['launches']:4} launches"
    )
