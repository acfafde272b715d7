"""The detailed-balance loss of B transitions and all its gradients: one launch forward, one multiplication backward.

    log F  = log F~(x_t) + log_looking,     log F' = log F~(x_next) + log_looking',  or log R(x_0) in the last transition
    delta  = log F + log P_F - log P_B - log F'
    loss   = g(delta / s),              g(x) = x^2, or 2 h |x| - h^2 beyond |x| > h

    dloss/dlog F = g'(delta / s) / s = -dloss/dlog F',   dloss/dlog P_F = w dloss/dlog F

A transition is a few numbers, so eager PyTorch spends its time on launches. The derivative is known as soon as the residual
is: forward stores it, and backward multiplies it by the upstream gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dag_kernels.launching import launch
from dag_kernels.reference import BalanceLoss

BLOCK = 256


@triton.jit
def detailed_balance_fwd_kernel(
    log_F, log_pf, log_pb, log_F_next, log_looking, log_looking_next, log_reward, is_terminal, scale, weight, result,
    num_rows, huber,
    HAS_LOOKING: tl.constexpr, HAS_END: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_HUBER: tl.constexpr, DETACH_NEXT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    flow = tl.load(log_F + rows, mask=mask, other=0.0)
    flow_next = tl.load(log_F_next + rows, mask=mask, other=0.0)
    if HAS_LOOKING:
        flow += tl.load(log_looking + rows, mask=mask, other=0.0)
        flow_next += tl.load(log_looking_next + rows, mask=mask, other=0.0)
    learns_next = mask
    if HAS_END:
        learns_next = tl.load(is_terminal + rows, mask=mask, other=1) == 0
        flow_next = tl.where(learns_next, flow_next, tl.load(log_reward + rows, mask=mask, other=0.0))
    delta = flow + tl.load(log_pf + rows, mask=mask, other=0.0)
    delta = delta - tl.load(log_pb + rows, mask=mask, other=0.0) - flow_next
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
    if not DETACH_NEXT:
        tl.store(result + 4 * num_rows + rows, tl.where(learns_next, -derivative, 0.0), mask=mask)


class _DetailedBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_F, log_pf, log_pb, log_F_next, options, huber, detach_next):
        rows = len(log_F)
        columns = [column.float().contiguous() for column in (log_F, log_pf, log_pb, log_F_next)]
        log_looking, _, _, is_terminal, scale, weight = options
        # The kernel never reads an absent column, so any pointer may stand for it.
        given = [columns[0] if c is None else c.contiguous() for c in options]
        result = torch.empty((4 if detach_next else 5, rows), dtype=torch.float32, device=log_F.device)
        launch(
            detailed_balance_fwd_kernel, (triton.cdiv(rows, BLOCK),), result,
            *columns, *given, result, rows, 0.0 if huber is None else float(huber),
            HAS_LOOKING=log_looking is not None, HAS_END=is_terminal is not None, HAS_SCALE=scale is not None,
            HAS_WEIGHT=weight is not None, HAS_HUBER=huber is not None, DETACH_NEXT=detach_next, BLOCK=BLOCK,
        )  # fmt: skip
        ctx.save_for_backward(result[2:])
        ctx.mark_non_differentiable(delta := result[1])
        return result[0], delta

    @staticmethod
    def backward(ctx, upstream, _):
        (slopes,) = ctx.saved_tensors
        d_log_F, d_log_pf, *d_next = (upstream * slopes).unbind()
        return d_log_F, d_log_pf, None, d_next[0] if d_next else None, None, None, None


def detailed_balance(
    log_F: Tensor,
    log_pf: Tensor,
    log_pb: Tensor,
    log_F_next: Tensor,
    log_looking: Tensor | None = None,
    log_looking_next: Tensor | None = None,
    log_reward: Tensor | None = None,
    is_terminal: Tensor | None = None,
    scale: Tensor | None = None,
    policy_weight: Tensor | None = None,
    huber: float | None = None,
    detach_next: bool = True,
) -> BalanceLoss:
    """The Triton form of `dag_kernels.reference.detailed_balance`: same arguments, same results."""
    options = (log_looking, log_looking_next, log_reward, is_terminal, scale, policy_weight)
    return BalanceLoss(*_DetailedBalance.apply(log_F, log_pf, log_pb, log_F_next, options, huber, detach_next))
