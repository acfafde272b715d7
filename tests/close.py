"""The rule by which a low-precision result is judged: as good as plain PyTorch in the same precision."""

import torch
from torch import Tensor


def assert_as_good_as(
    name: str, found: Tensor, plain: Tensor, exact: Tensor, *, factor: float = 2.0, terms: float = 0.0
) -> None:
    """The largest error of `found` is at most `factor` times that of `plain`, both against `exact` (float64).

    Where plain PyTorch is exact by luck, a rounding on the way in and one on the way out are allowed all the same, of
    the largest value or of the largest of the `terms` whose difference it is.
    """
    assert found.dtype == plain.dtype and found.shape == plain.shape, name
    assert bool(found.isfinite().all()), f"{name}: not finite"
    error = (found.double() - exact).abs()
    plain_error = float((plain.double() - exact).abs().max())
    rounding = torch.finfo(found.dtype).eps * max(terms, float(exact.abs().max()))
    worst = int(error.argmax())
    assert float(error.max()) <= max(factor * plain_error, 2 * rounding), (
        f"{name}: error {float(error.max()):.3e} at element {worst} (value {float(exact.flatten()[worst]):.6g}); "
        f"plain PyTorch's is {plain_error:.3e}, one rounding {rounding:.3e}"
    )
