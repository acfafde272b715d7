"""The detailed-balance loss of B transitions and all its gradients, in one launch.

    delta = log F + log P_F - log P_B - log F',   loss = g(delta / s),   g(x) = x^2, or 2 h |x| - h^2 beyond |x| > h

    dloss/dlog F = g'(delta / s) / s = -dloss/dlog F',   dloss/dlog P_F = w dloss/dlog F

A row is a few numbers, so eager PyTorch spends its time on launches. The derivative is known as soon as the residual is;
backward multiplies it by what comes from above.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dag_kernels.reference import BalanceLoss

BLOCK = 256


@triton.jit
def _loss(
    log_F, log_pf, log_pb, log_F_next, scale, weight, result, num_rows, huber,
    HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_HUBER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    delta = tl.load(log_F + rows, mask=mask, other=0.0) + tl.load(log_pf + rows, mask=mask, other=0.0)
    delta = delta - tl.load(log_pb + rows, mask=mask, other=0.0) - tl.load(log_F_next + rows, mask=mask, other=0.0)
    x = delta
    slope = 1.0
    if HAS_SCALE:
        s = tl.load(scale + rows, mask=mask, other=1.0)
        x = delta / s
        slope = 1.0 / s
    loss = x * x
    derivative = 2.0 * x
    if HAS_HUBER:
        beyond = tl.abs(x) > huber
        loss = tl.where(beyond, huber * (2.0 * tl.abs(x) - huber), loss)
        derivative = tl.where(beyond, tl.where(x > 0, 2.0 * huber, -2.0 * huber), derivative)
    derivative = derivative * slope
    weighted = derivative
    if HAS_WEIGHT:
        weighted = derivative * tl.load(weight + rows, mask=mask, other=1.0)
    tl.store(result + rows, loss, mask=mask)
    tl.store(result + num_rows + rows, delta, mask=mask)
    tl.store(result + 2 * num_rows + rows, derivative, mask=mask)
    tl.store(result + 3 * num_rows + rows, weighted, mask=mask)


class _DetailedBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_F, log_pf, log_pb, log_F_next, scale, weight, huber, detach_next):
        rows = len(log_F)
        columns = [column.float().contiguous() for column in (log_F, log_pf, log_pb, log_F_next)]
        optional = [columns[0] if c is None else c.float().contiguous() for c in (scale, weight)]
        result = torch.empty((4, rows), dtype=torch.float32, device=log_F.device)
        _loss[(triton.cdiv(rows, BLOCK),)](
            *columns, *optional, result, rows, 0.0 if huber is None else float(huber),
            HAS_SCALE=scale is not None, HAS_WEIGHT=weight is not None, HAS_HUBER=huber is not None, BLOCK=BLOCK,
        )  # fmt: skip
        loss, delta, derivative, weighted = result.unbind()
        ctx.save_for_backward(derivative, weighted)
        ctx.detach_next = detach_next
        ctx.mark_non_differentiable(delta)
        return loss, delta

    @staticmethod
    def backward(ctx, upstream, _):
        derivative, weighted = ctx.saved_tensors
        d_log_F = upstream * derivative
        d_next = None if ctx.detach_next else -d_log_F
        return d_log_F, upstream * weighted, None, d_next, None, None, None, None


def detailed_balance(
    log_F: Tensor,
    log_pf: Tensor,
    log_pb: Tensor,
    log_F_next: Tensor,
    scale: Tensor | None = None,
    policy_weight: Tensor | None = None,
    huber: float | None = None,
    detach_next: bool = True,
) -> BalanceLoss:
    """The Triton form of `dag_kernels.reference.detailed_balance`: same arguments, same results."""
    return BalanceLoss(
        *_DetailedBalance.apply(log_F, log_pf, log_pb, log_F_next, scale, policy_weight, huber, detach_next)
    )
