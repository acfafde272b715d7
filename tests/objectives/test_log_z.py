"""Trajectory balance whose log Z is a flow of the first noise (`log_z: flow`): closed forms, identities, laws that it reaches."""

from typing import Any

import pytest
import torch
from helpers.toy_gfn import Bowl, Mixture, Settings, ToyGFN
from torch import Tensor
from torch.distributions import Normal

from dag.chain.schedule import Schedule
from dag.objectives import OBJECTIVES, Objective, UpdateScalars
from dag.objectives.transition import Transition, residual_table
from dag.recipe import Beta, SubTrajectoryBalance, TrajectoryBalance

N, T = 12, 5


def tb(log_z: str = "flow", **options: Any) -> Objective:
    return OBJECTIVES["tb"](TrajectoryBalance(name="tb", beta=Beta(value=1), log_z=log_z, **options))


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formed(objective: Objective, update: UpdateScalars) -> tuple[Tensor, Tensor]:
    advantage, slope = objective.advantages(update), objective.flow_slopes(update)
    assert advantage is not None and slope is not None
    return advantage.double(), slope.double()


def test_it_has_the_gradient_of_the_squared_residual() -> None:
    """Of the mean of d^2 / 2 over the trajectories, divided by T, as the policy's is."""
    log_pf, log_F = values(N, T).requires_grad_(), values(N, seed=3).requires_grad_()
    log_pb, log_reward = values(N, T, seed=1), values(N, seed=2)
    d = log_F + (log_pf - log_pb).sum(1) - log_reward
    expected = torch.autograd.grad(0.5 * d.square().mean() / T, (log_pf, log_F))
    known = UpdateScalars((log_pf - log_pb).detach(), log_reward, residuals=d.detach()[:, None])
    advantage, slope = formed(tb(), known)
    k = torch.zeros(N, dtype=torch.int64)
    losses = [
        tb()(
            Transition(
                k=k + step, is_terminal=k + step == T - 1, log_pf=log_pf[:, step], log_pf_old=log_pf[:, step].detach(),
                log_pb=log_pb[:, step], log_reward=log_reward, log_F_tilde=log_F, advantage=advantage[:, step],
                flow_slope=slope[:, step],
            )
        ).loss
        for step in range(T)
    ]  # fmt: skip
    found = torch.autograd.grad(torch.stack(losses).mean(), (log_pf, log_F))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_is_sub_trajectory_balance_with_the_whole_trajectory_as_its_only_piece() -> None:
    """SubTB towards lambda = infinity is T d^2, so all its slopes are 2 T times these."""
    zeros = torch.zeros(N, T, dtype=torch.float64)
    delta = residual_table(values(N, T, seed=3), zeros, values(N, T), values(N, T, seed=1), values(N, seed=2))
    known = UpdateScalars(log_ratio=zeros, residuals=delta)
    subtb = OBJECTIVES["subtb"](SubTrajectoryBalance(name="subtb", beta=Beta(value=1), decay=1e9))
    (advantage, slope), (theirs, their_slope) = formed(tb(), known), formed(subtb, known)
    torch.testing.assert_close(2 * T * advantage, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(2 * T * slope.sum(1), their_slope[:, 0], rtol=1e-5, atol=1e-5)
    assert float(their_slope[:, 1:].abs().max()) < 1e-5


def test_the_residual_is_clipped_for_the_policy_alone() -> None:
    known = UpdateScalars(torch.zeros(3, T), torch.zeros(3), residuals=torch.tensor([[0.5], [-9.0], [4.0]]))
    advantage, slope = formed(tb(advantage_clip=2.0), known)
    assert advantage[:, 0].tolist() == [-0.5, 2.0, -2.0]
    assert (T * slope[:, 0]).tolist() == pytest.approx([0.5, -9.0, 4.0])
    assert tb("batch").flow_slopes(known) is None
    assert tb().uses_flow and not tb("batch").uses_flow


def test_residual_and_gradients_are_zero_where_the_tilted_flow_is_exact() -> None:
    """Data N(m, 1 - ab_end) at the chain's end and the reward a x_0, on the 50 steps of Stable Diffusion, on unrelated states.

    log G(x) = log N(x; m_k + shift, 1 - ab_k) - log N(x; m_k, 1 - ab_k) + log Z is the flow over the pretrained marginal, with
    shift = sqrt(ab_k / ab_end) (1 - ab_end) a, and log Z of each trajectory is that of its first noise. One log Z of all of them
    leaves what the first noise makes of it.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
    )
    schedule, mean, slope, shape = Schedule.from_diffusers(scheduler, 50), 0.7, -1.3, (N, 2, 3, 3)
    end = schedule.signal_next[-1].square()
    levels = torch.cat([schedule.alpha_bar_t, end[None]])
    log_ratio, chain = [], 1.5 * values(51, *shape)
    for k in range(50):
        ab = schedule.alpha_bar_t[k]
        pretrained = (chain[k] - ab.sqrt() * mean) / (1 - ab).sqrt()
        h = (levels[k + 1] / end).sqrt() * (1 - end) / (1 - levels[k + 1]) * slope
        output = pretrained + schedule.sigma[k].square() / schedule.mean_output[k] * h
        pair = (schedule.log_pf(chain[k], chain[k + 1], one, k) for one in (output, pretrained))
        log_ratio.append(next(pair) - next(pair))
    ab, log_reward = levels[0], slope * chain[-1].flatten(1).sum(1)
    centre, shift, sd = ab.sqrt() * mean, (ab / end).sqrt() * (1 - end) * slope, (1 - ab).sqrt()
    tilted, plain = (Normal(one, sd).log_prob(chain[0]) for one in (centre + shift, centre))
    constant = 18 * (slope * end.sqrt() * mean + (1 - end) * slope**2 / 2)
    log_F = (tilted - plain).flatten(1).sum(1) + constant
    known = UpdateScalars(torch.stack(log_ratio, 1), log_reward)
    d = log_F + torch.stack(log_ratio, 1).sum(1) - log_reward
    advantage, flow = formed(tb(), UpdateScalars(known.log_ratio, log_reward, residuals=d[:, None]))
    assert float(advantage.abs().max()) < 1e-8 * float(log_reward.abs().max())
    assert float(flow.abs().max()) < 1e-8 * float(log_reward.abs().max())
    batch = tb("batch").advantages(known)
    assert batch is not None
    others = (log_F.sum() - log_F) / (N - 1)
    torch.testing.assert_close(batch[:, 0], log_F - others, rtol=1e-6, atol=1e-8)
    assert float(batch.abs().max()) > 1e-4


# -- optima -------------------------------------------------------------------------------------------------------


def optimum(log_z: str, lean: tuple[float, float]) -> Tensor:
    """(2,) how far a policy of one step has moved N(0.8 s, 0.25) towards exp(x_0), for the first noises s = -1 and 1.

    It is trained on x_0 of another policy, which has moved them by `lean`.
    """
    sd, z = 0.5, Normal(0.0, 1.0).icdf((torch.arange(64, dtype=torch.float64) + 0.5) / 64)
    start = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat_interleave(64)
    which = (start > 0).long()
    pretrained = 0.8 * start
    x_0 = pretrained + torch.tensor(lean, dtype=torch.float64)[which] + sd * z.repeat(2)
    moved, log_F = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    objective, optimizer = tb(log_z), torch.optim.LBFGS([moved, log_F], 0.5, max_iter=400, tolerance_change=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_pf = Normal(pretrained + moved[which], sd).log_prob(x_0)
        ratio = (log_pf - Normal(pretrained, sd).log_prob(x_0)).detach()[:, None]
        d = log_F[which].detach()[:, None] + ratio - x_0[:, None]
        known = UpdateScalars(ratio, x_0, residuals=d, is_off_policy=True)
        advantage, slope = objective.advantages(known), objective.flow_slopes(known)
        assert advantage is not None
        loss = -(advantage[:, 0].detach() * log_pf).mean()
        if slope is not None:
            loss = loss + (slope[:, 0] * log_F[which]).mean()
        loss.backward()
        # The value that has this gradient, for the line search's sake.
        residual = d[:, 0] if log_z == "flow" else ratio[:, 0] - x_0 - (ratio[:, 0] - x_0).mean()
        return 0.5 * residual.square().mean()

    for _ in range(5):
        optimizer.step(closure)
    return moved.detach()


def test_off_policy_the_optimum_does_not_depend_on_the_data() -> None:
    """The balanced policy moves both by sd^2 = 0.25. One log Z for both fits what the data happen to show instead."""
    leans = [(0.0, 0.0), (1.0, 0.0), (-0.5, 1.0)]
    flow, batch = ([optimum(kind, lean) for lean in leans] for kind in ("flow", "batch"))
    print("\nflow", *(one.tolist() for one in flow), "\nbatch", *(one.tolist() for one in batch))
    for found in flow:
        torch.testing.assert_close(found, torch.full((2,), 0.25, dtype=torch.float64), rtol=0, atol=1e-3)
    assert max(float((one - 0.25).abs().max()) for one in batch) > 0.1
    assert float((batch[1] - batch[2]).abs().max()) > 0.1


@pytest.mark.parametrize(("has_prior", "mass"), [(False, 0.257), (True, 0.274)])
def test_it_reaches_the_law_of_a_toy(has_prior: bool, mass: float) -> None:
    """The window of `log_z: batch`, around the best possible left mass. As in training the flow has no preview."""
    data = Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), 0.25)
    target = Bowl(slope=0.45, centre=0.2) if has_prior else Mixture(torch.tensor([0.3, 0.7]), data.means, 0.25)
    made = ToyGFN(data, target, torch.linspace(-3.5, 3.5, 29), 2, has_prior=has_prior)
    made.weights = torch.zeros_like(made.weights)
    settings = Settings(iterations=300, warmup=0 if has_prior else 50, policy_lr=0.05, flow_lr=0.5)
    made.train(tb(prior="pretrained" if has_prior else "none"), settings)
    found = [float((samples < 0).float().mean()) for samples in made.samples(20_000)]
    print(f"\ntb with a flow, {'prior' if has_prior else 'density'}: left mass {found}", end="")
    assert found == pytest.approx([mass, mass], abs=0.012)
