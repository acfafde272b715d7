"""The rule by which a low-precision result is judged: as good as plain PyTorch in the same precision."""

import torch
from torch import Tensor


def assert_as_good_as(name: str, found: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """The largest error of `found` is at most `factor` times that of `plain`, both against `exact` (float64).

    One rounding of the largest value in the result's own dtype is always allowed: plain PyTorch may be exact by luck.
    """
    assert found.dtype == plain.dtype and found.shape == plain.shape, name
    assert bool(found.isfinite().all()), f"{name}: not finite"
    error = (found.double() - exact).abs()
    allowed = factor * float((plain.double() - exact).abs().max())
    rounding = torch.finfo(found.dtype).eps * float(exact.abs().max())
    worst = int(error.argmax())
    assert float(error.max()) <= max(allowed, rounding), (
        f"{name}: error {float(error.max()):.3e} at element {worst} (value {float(exact.flatten()[worst]):.6g}); "
        f"plain PyTorch's is {allowed / factor:.3e}, one rounding {rounding:.3e}"
    )
