"""The per-step KL of a Gaussian policy in closed form, with the flow's gradient at the next state in place of its value.

DAG minimises, in every step, over the mean mu of P_F = N(mu, sigma^2 I),

    KL(P_F(. | x_t) || P_ref(. | x_t) F / Z) = E[log P_F - log P_ref - log F(x_next)] + log Z,        x_next = mu + sigma z,

where P_ref is P_B(x_t | x_next) as a function of x_next, or the pretrained policy (`objective.prior`). Either is Gaussian,
N(m, v I), so that the first two terms are closed forms and only log F needs samples. Its gradient is that of E[log F] = E[y],
y = d log F / d x_next, hence

    grad_mu KL = (mu - m) / v - E[y] = grad_mu  1/(2 v) |mu - (m + v y)|^2,       y without gradient.

The last expression is the KL to N(m + v y, sigma^2 I) times sigma^2 / v, which the transition kernel computes from the network
output that has this mean. A score function, the residual times z / sigma, has the same expectation; its noise is that of z,
D numbers per sample of which the reward explains a few thousandths, whereas y is free of it.

Legend: B samples, D elements of a latent; o is the network output, mu = mean_x x_t + mean_output o.
"""

from dataclasses import dataclass

import torch
from dag_kernels import at_least_float32
from torch import Tensor

from dag.chain.schedule import Schedule


@dataclass(frozen=True)
class Target:
    """The policy that a step is pulled towards: weight * KL(P_F || N(mu(output), sigma^2 I)) is the loss."""

    output: Tensor
    """(B, C, H, W) float32 network output whose mean is the target's."""
    weight: Tensor | float
    """() sigma^2 / v."""


def against_pretrained(schedule: Schedule, k: int, y: Tensor, pretrained: Tensor) -> Target:
    """The target with the pretrained policy as P_ref: m is its mean, v = sigma^2.

    It is also residual nabla-DB's, e = (mu - m) / sigma^2 - y = 0 (Liu et al. 2025), with its square weighted by sigma^2 / 2.

    Args:
        y:          (B, C, H, W) d log F / d x_next.
        pretrained: (B, C, H, W) the pretrained network's output at x_t.
    """
    return Target(at_least_float32(pretrained) + schedule.sigma[k].square() / schedule.mean_output[k] * y, 1.0)


def against_noising(schedule: Schedule, k: int, y: Tensor, x_t: Tensor) -> Target:
    """The target with P_B(x_t | x_next) = N(q x_next, s^2 I) as P_ref: m = x_t / q, v = s^2 / q^2.

    Args:
        y:   (B, C, H, W) d log F / d x_next.
        x_t: (B, C, H, W).
    """
    x, variance = at_least_float32(x_t), (schedule.noising_std[k] / schedule.noising_x[k]).square()
    mean = x / schedule.noising_x[k] + variance * y
    return Target((mean - schedule.mean_x[k] * x) / schedule.mean_output[k], schedule.sigma[k].square() / variance)


def against_noising_pointwise(schedule: Schedule, k: int, y: Tensor, x_t: Tensor, x_next: Tensor) -> Target:
    """The target of nabla-DB's residual at the sampled x_next itself, sigma^2 / 2 |e|^2 (Liu et al. 2025):

        e = grad_{x_next} [log P_F(x_next | x_t) - log P_B(x_t | x_next) - log F(x_next)].

    Its expected gradient is that of `against_noising`; it vanishes at every x_next, not only on average, where F is exact.
    """
    x, x_n = at_least_float32(x_t), at_least_float32(x_next)
    q, variance = schedule.noising_x[k], schedule.noising_std[k].square()
    mean = x_n + schedule.sigma[k].square() * (y + q * (x - q * x_n) / variance)
    return Target((mean - schedule.mean_x[k] * x) / schedule.mean_output[k], 1.0)


def reverse_score(
    schedule: Schedule, k: int, x_t: Tensor, x_next: Tensor, output: Tensor, pretrained: Tensor | None
) -> Tensor:
    """(B, C, H, W) grad_{x_t} [log P_F(x_next | x_t) - log P_ref(x_next | x_t)], or with log P_B(x_t | x_next) for P_ref.

    Where the flow is exact it is -grad log F(x_t): the reverse half of nabla-DB, which the learnt flow is trained by.

    Args:
        x_t:        (B, C, H, W) float32, a leaf that requires a gradient.
        x_next:     (B, C, H, W).
        output:     (B, C, H, W) the policy's output at x_t, with its graph, which is kept.
        pretrained: (B, C, H, W) the pretrained network's output at x_t, with its graph; None takes P_B.
    """
    x, x_n = x_t.detach(), at_least_float32(x_next.detach())
    a, b, variance = schedule.mean_x[k], schedule.mean_output[k], schedule.sigma[k].square()

    def pulled(o: Tensor) -> tuple[Tensor, Tensor]:
        """(v, J^T v) with v = (x_next - mu) / sigma^2 and J = d o / d x_t."""
        v = (x_n - a * x - b * at_least_float32(o.detach())) / variance
        (product,) = torch.autograd.grad(o, x_t, v.to(o.dtype), retain_graph=True)
        return v, at_least_float32(product)

    v, product = pulled(output)
    if pretrained is None:
        q = schedule.noising_x[k]
        return a * v + b * product + (x - q * x_n) / schedule.noising_std[k].square()
    _, its_product = pulled(pretrained)
    # x_next cancels in v - v_ref: the difference of two scores of size z / sigma would lose digits.
    difference = at_least_float32(pretrained.detach()) - at_least_float32(output.detach())
    return a * b / variance * difference + b * (product - its_product)
