"""Objectives whose gradient is a table of advantages: identities between them, and laws that they reach."""

from typing import Any

import pytest
import torch
from helpers.toy_gfn import Bowl, Mixture, Settings, ToyGFN
from torch import Tensor

from dag.objectives import OBJECTIVES, Objective, UpdateScalars
from dag.objectives.groups import centred
from dag.objectives.registry import clipped_surrogate
from dag.objectives.transition import Transition, residual_table
from dag.recipe import (
    Beta,
    DirectPreference,
    ForwardLooking,
    PolicyGradient,
    Regression,
    SubTrajectoryBalance,
    TrajectoryBalance,
)

N, T = 12, 5


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tb(per_group: int = 1, **options: Any) -> Objective:
    return OBJECTIVES["tb"](TrajectoryBalance(name="tb", beta=Beta(value=1), **options), per_group=per_group)


def ddpo(per_group: int = 1, **options: Any) -> Objective:
    return OBJECTIVES["ddpo"](PolicyGradient(name="ddpo", **options), per_group=per_group)


def test_the_mean_of_the_others_in_a_group_is_subtracted() -> None:
    found = centred(torch.tensor([1.0, 2.0, 6.0, 10.0, 30.0, 50.0]), 3)
    assert found.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 10 - 40, 30 - 30, 50 - 20]
    assert centred(torch.tensor([1.0, 2.0, 6.0]), 1).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5], "the update is one group"
    with pytest.raises(ValueError, match="at least 2"):
        centred(torch.tensor([1.0]), 1)


@pytest.mark.parametrize("per_group", [1, 4])
def test_tbs_gradient_is_that_of_the_variance_of_its_residual(per_group: int) -> None:
    """Summed over the trajectories it is K / 2 times that of the unbiased variance in each group of K."""
    log_pf, log_pb, log_reward = values(N, T).requires_grad_(), values(N, T, seed=1), values(N, seed=2)
    e = (log_pf - log_pb).sum(1) - log_reward
    size = N if per_group == 1 else per_group
    (expected,) = torch.autograd.grad(0.5 * size * e.view(-1, size).var(1).sum(), log_pf)
    log_ratio = (log_pf - log_pb).detach()
    advantage = tb(per_group).advantages(UpdateScalars(log_ratio, log_reward))
    assert advantage is not None
    surrogate, _ = clipped_surrogate(advantage, log_pf - log_pf.detach(), 0.2)
    (ours,) = torch.autograd.grad(surrogate.sum(), log_pf)
    torch.testing.assert_close(ours, expected)


def test_all_pairs_of_a_prompt_have_the_gradient_of_the_variance() -> None:
    """PRDP's loss: the mean over all pairs of (e_i - e_j)^2 is twice the unbiased variance of e."""
    e = values(N)
    first, second = torch.triu_indices(N, N, offset=1)
    torch.testing.assert_close((e[first] - e[second]).square().mean(), 2 * e.var())


def test_at_the_pretrained_model_relative_tb_is_grpo_without_a_standard_deviation() -> None:
    """There log P_F equals the prior, and e is -beta r; GRPO's mean includes the trajectory itself."""
    reward, per_group = values(N).float(), 4
    advantage = tb(per_group).advantages(UpdateScalars(torch.zeros(N, T), reward))
    grpo = ddpo(per_group, std="none", advantage_clip=100).observe(reward, torch.zeros(N))
    assert advantage is not None and grpo is not None
    torch.testing.assert_close(advantage, (per_group / (per_group - 1) * grpo)[:, None].expand(N, T))


def test_long_sums_keep_small_differences() -> None:
    """A thousand steps of 20,000 nats each, and rewards of one nat: float32 sums would lose half of a nat."""
    log_ratio = 20_000 + values(2, 1000).float()
    exact = log_ratio.double().sum(1)
    advantage = tb().advantages(UpdateScalars(log_ratio, torch.zeros(2)))
    assert advantage is not None
    torch.testing.assert_close(advantage[:, 0].double(), exact.flip(0) - exact, rtol=1e-6, atol=0)


def test_tbs_advantages_are_clipped() -> None:
    advantage = tb(advantage_clip=2.0).advantages(UpdateScalars(torch.zeros(3, T), torch.tensor([0.0, 10.0, 1.0])))
    assert advantage is not None
    assert advantage[:, 0].tolist() == [-2.0, 2.0, -2.0]


def test_rewards_are_compared_within_groups() -> None:
    reward, prompt = torch.tensor([1.0, 3.0, 10.0, 20.0]), torch.tensor([0, 0, 1, 1])
    assert ddpo(2, std="none", advantage_clip=9).observe(reward, prompt).tolist() == [-1, 1, -5, 5]  # type: ignore[union-attr]
    in_groups = ddpo(2, std="group").observe(reward, prompt)
    assert in_groups is not None
    assert in_groups.tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-4)
    overall = ddpo(2, std="all").observe(reward, prompt)
    sd = float(reward.std(correction=0))
    assert overall is not None
    assert overall.tolist() == pytest.approx([-1 / sd, 1 / sd, -5 / sd, 5 / sd], abs=1e-4)
    assert float(overall.view(2, 2).sum(1).abs().max()) < 1e-6


def test_a_floor_keeps_the_rounding_of_equal_rewards_small() -> None:
    reward, prompt = torch.tensor([0.3000001, 0.3, 0.3, 0.3]), torch.zeros(4)
    rounding, floored = (ddpo(4, std="group", std_floor=floor).observe(reward, prompt) for floor in (1e-8, 1e-4))
    assert rounding is not None and floored is not None
    assert float(rounding[0]) > 1
    assert float(floored.abs().max()) < 1e-3


def test_a_reward_is_compared_with_what_was_expected_of_its_state() -> None:
    """With the mean of the others as the value of every state it is, up to N / (N - 1), the advantage of a group."""
    reward, values = torch.tensor([1.0, 3.0, 8.0]), torch.tensor([[0.0, 2.0], [3.0, 1.0], [8.0, 9.0]])
    valued = ddpo(baseline="value", std="none", advantage_clip=1.5)
    assert valued.observe(reward, torch.zeros(3)) is None
    found = valued.advantages(UpdateScalars(reward=reward, values=values))
    assert found is not None
    assert found.tolist() == [[1, -1], [0, 1.5], [0, -1]]
    others = ((reward.sum() - reward) / 2)[:, None].expand(3, T)
    found = ddpo(baseline="value").advantages(UpdateScalars(reward=reward, values=others))
    expected = ddpo().observe(reward, torch.zeros(3))
    assert found is not None and expected is not None
    torch.testing.assert_close(found, 1.5 * expected[:, None].expand(3, T))
    assert ddpo().advantages(UpdateScalars(reward=reward)) is None


# -- sub-trajectory balance ---------------------------------------------------------------------------------------


def subtb(decay: float, **options: Any) -> Objective:
    return OBJECTIVES["subtb"](SubTrajectoryBalance(name="subtb", beta=Beta(value=1), decay=decay, **options))


def slopes_of_pieces(decay: float, *, detach_next: bool) -> tuple[Tensor, Tensor]:
    """(d loss / d log P_F, d loss / d log F), (N, T) each, by autograd of the sum over all pieces."""
    log_pf, log_F = values(N, T).requires_grad_(), values(N, T, seed=3).requires_grad_()
    ends = torch.cat([log_F, torch.zeros(N, 1, dtype=torch.float64)], 1)  # the last state has the reward and no flow
    step, total, loss = log_pf - values(N, T, seed=1), 0.0, torch.zeros((), dtype=torch.float64)
    log_reward = torch.cat([torch.zeros(N, T, dtype=torch.float64), values(N, 1, seed=2)], 1)
    for i in range(T):
        for j in range(i + 1, T + 1):
            end = ends[:, j].detach() if detach_next else ends[:, j]
            delta = ends[:, i] + step[:, i:j].sum(1) - end - log_reward[:, j]
            loss, total = loss + decay ** (j - i) * delta.square().sum(), total + decay ** (j - i)
    found = torch.autograd.grad(T * loss / total, (log_pf, log_F))
    return found[0], found[1]


def scalars_of_pieces() -> UpdateScalars:
    log_pf, log_pb, log_F = values(N, T), values(N, T, seed=1), values(N, T, seed=3)
    zeros = torch.zeros(N, T, dtype=torch.float64)
    return UpdateScalars(residuals=residual_table(log_F, zeros, log_pf, log_pb, values(N, 1, seed=2)[:, 0]))


@pytest.mark.parametrize("decay", [0.9, 2.0])
@pytest.mark.parametrize("detach_next", [True, False])
def test_subtbs_slopes_are_those_of_the_sum_over_all_pieces(decay: float, detach_next: bool) -> None:
    policy, flow = slopes_of_pieces(decay, detach_next=detach_next)
    objective, known = subtb(decay, detach_next=detach_next), scalars_of_pieces()
    advantage, slope = objective.advantages(known), objective.flow_slopes(known)
    assert advantage is not None and slope is not None
    torch.testing.assert_close(-advantage.double(), policy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double(), flow, rtol=1e-5, atol=1e-5)


def test_subtb_is_detailed_balance_and_trajectory_balance_at_its_ends() -> None:
    known = scalars_of_pieces()
    assert known.residuals is not None
    short, long = subtb(1e-9).advantages(known), subtb(1e9).advantages(known)
    assert short is not None and long is not None
    torch.testing.assert_close(short.double(), -2 * known.residuals, rtol=1e-5, atol=1e-5)
    whole = -2 * T * known.residuals.sum(1, keepdim=True).expand(N, T)
    torch.testing.assert_close(long.double(), whole, rtol=1e-5, atol=1e-5)


def test_subtbs_loss_has_these_slopes() -> None:
    log_pf, log_F = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    k = torch.arange(3)
    transition = Transition(
        k=k, is_terminal=k == 2, log_pf=log_pf, log_pf_old=torch.zeros(3), log_pb=torch.zeros(3), log_reward=torch.zeros(3),
        log_F_tilde=log_F, advantage=torch.tensor([1.0, -2.0, 3.0]), flow_slope=torch.tensor([4.0, 5.0, -6.0]),
    )  # fmt: skip
    subtb(0.9)(transition).loss.sum().backward()
    assert log_pf.grad is not None and log_F.grad is not None
    assert log_pf.grad.tolist() == [-1.0, 2.0, -3.0]
    assert log_F.grad.tolist() == [4.0, 5.0, -6.0]


# -- preferences and regression -----------------------------------------------------------------------------------


def dpo(strength: float, per_group: int = 2) -> Objective:
    return OBJECTIVES["dpo"](DirectPreference(name="dpo", strength=strength), per_group=per_group)


def test_dpos_gradient_is_that_of_the_logistic_loss_of_pairs() -> None:
    reward, strength = values(N, seed=2), 0.7
    rho = values(N, T).requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for pair in range(N // 2):
        a, b = 2 * pair, 2 * pair + 1
        best, worst = (a, b) if reward[a] > reward[b] else (b, a)
        loss = loss - torch.nn.functional.logsigmoid(strength * (rho[best] - rho[worst])).sum()
    (expected,) = torch.autograd.grad(loss, rho)
    advantage = dpo(strength).advantages(UpdateScalars(log_ratio=rho.detach(), reward=reward))
    torch.testing.assert_close(advantage, -expected)


def test_only_the_best_and_the_worst_of_a_group_are_compared() -> None:
    reward = torch.tensor([0.0, 3.0, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0])
    advantage = dpo(0.5, per_group=4).advantages(UpdateScalars(log_ratio=torch.zeros(8, 1), reward=reward))
    assert advantage is not None
    assert advantage[:, 0].tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0], "half of the strength at the pretrained model"


def regression(per_group: int = 1, **options: Any) -> Objective:
    return OBJECTIVES["regression"](Regression(name="regression", **options), per_group=per_group)


def test_regression_imitates_the_best_or_all_by_their_weight() -> None:
    reward = torch.tensor([1.0, 4.0, 2.0, 3.0, 7.0, 7.0, 7.0, 7.0])
    known = UpdateScalars(log_ratio=torch.zeros(8, 2), reward=reward)
    top = regression(4, weights="top", keep=2).advantages(known)
    assert top is not None
    assert top[:4, 0].tolist() == [-1, 1, -1, 1]
    assert float(top.view(2, 4, 2).sum(1).abs().max()) == 0, "the mean weight is subtracted"
    soft = regression(4, weights="softmax", beta=2.0).advantages(known)
    expected = 4 * torch.softmax(2 * reward[:4] / reward.std(correction=0), 0) - 1
    assert soft is not None
    torch.testing.assert_close(soft[:4, 1], expected)
    assert float(soft[4:].abs().max()) < 1e-6, "equal rewards have nothing to teach"


# -- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("has_prior", "mass"), [(True, 0.274), (False, 0.257)])
def test_tb_reaches_the_tilted_law_of_a_toy(has_prior: bool, mass: float) -> None:
    """Left mass of the best Gaussian steps, with the pretrained model in the target and for a density (whose own is .300)."""
    data = Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), 0.25)
    target = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.0]]), 0.25)
    reward = Bowl(slope=0.45, centre=0.2) if has_prior else target
    made = ToyGFN(data, reward, torch.linspace(-3.5, 3.5, 29), 2, has_prior=has_prior)
    made.train(tb(prior="pretrained" if has_prior else "none"), Settings(iterations=300, warmup=0, policy_lr=0.05))
    found = [float((samples < 0).float().mean()) for samples in made.samples(20_000)]
    print(f"\ntb, {'prior' if has_prior else 'density'}: left mass {' '.join(f'{one:.3f}' for one in found)}", end="")
    assert found == pytest.approx([mass, mass], abs=0.012)


def test_subtb_reaches_the_tilted_law_of_a_toy() -> None:
    data = Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), 0.25)
    made = ToyGFN(data, Bowl(slope=0.45, centre=0.2), torch.linspace(-3.5, 3.5, 29), 2, has_prior=True)
    section = {"prior": "pretrained", "forward_looking": ForwardLooking(weight="alpha_bar")}
    made.train(subtb(0.9, **section), Settings(iterations=400, warmup=100, policy_lr=0.03, flow_lr=0.3))
    found = [float((samples < 0).float().mean()) for samples in made.samples(20_000)]
    print(f"\nsubtb: left mass {' '.join(f'{one:.3f}' for one in found)}", end="")
    assert found == pytest.approx([0.274, 0.274], abs=0.015)
