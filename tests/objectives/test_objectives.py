"""Objectives as pure functions of transitions: values, and which gradient flows where."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from dag_kernels import penalty

from dag.objectives import OBJECTIVES, UpdateScalars
from dag.objectives.registry import clipped_surrogate
from dag.objectives.transition import Transition
from dag.recipe import DetailedBalance, KLDivergence, PolicyGradient

B = 6


def values(seed: int) -> torch.Tensor:
    return torch.randn(B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transitions() -> Transition:
    """Six transitions, the last two terminal; every input is a leaf, so that a gradient into it would be seen."""
    log_pf = values(0).requires_grad_()
    return Transition(
        k=torch.arange(B), is_terminal=torch.arange(B) >= 4, log_pf=log_pf, log_pf_old=log_pf.detach().clone(),
        log_pb=values(1).requires_grad_(), log_reward=values(2).requires_grad_(), log_F_tilde=values(3).requires_grad_(),
        log_F_tilde_next=values(4).requires_grad_(), log_looking=values(5).requires_grad_(),
        log_looking_next=values(6).requires_grad_(), advantage=values(7),
    )  # fmt: skip


def dag_db(**options: Any) -> Any:
    return OBJECTIVES["dag_db"](DetailedBalance(name="dag_db", beta={"value": 1.0}, **options))


def known(residuals: torch.Tensor, scale: Any = None, mean: Any = None) -> UpdateScalars:
    """What an objective learns of an update with these residuals (N, T); by default they are not scaled and have had mean 0."""
    T = residuals.shape[1]
    scale, mean = (torch.ones(T) if scale is None else scale), (torch.zeros(T) if mean is None else mean)
    return UpdateScalars(residuals=residuals, residual_scale=scale, running_mean=mean)


def dag_kl(**options: Any) -> Any:
    return OBJECTIVES["dag_kl"](KLDivergence(name="dag_kl", beta={"value": 1.0}, **options))


def expected_residual(t: Transition) -> torch.Tensor:
    assert (
        t.log_F_tilde is not None
        and t.log_F_tilde_next is not None
        and t.log_looking is not None
        and t.log_looking_next is not None
    )
    following = torch.where(t.is_terminal, t.log_reward, t.log_F_tilde_next + t.log_looking_next)
    return (t.log_F_tilde + t.log_looking + t.log_pf - t.log_pb - following).detach()


def test_dag_db_is_the_squared_residual_and_detaches_the_next_flow() -> None:
    t = transitions()
    output = dag_db()(t)
    delta = expected_residual(t)
    torch.testing.assert_close(output.loss, delta.square())
    torch.testing.assert_close(output.residual, delta)
    output.loss.sum().backward()
    torch.testing.assert_close(t.log_pf.grad, 2 * delta)
    torch.testing.assert_close(t.log_F_tilde.grad, 2 * delta)  # type: ignore[union-attr]
    assert t.log_F_tilde_next.grad is None  # type: ignore[union-attr]


def test_published_dag_db_pulls_on_the_next_flow_too() -> None:
    t = transitions()
    dag_db(detach_next=False)(t).loss.sum().backward()
    assert t.log_F_tilde_next is not None
    assert t.log_F_tilde_next.grad is not None
    torch.testing.assert_close(t.log_F_tilde_next.grad[:4], -2 * expected_residual(t)[:4])
    assert t.log_F_tilde_next.grad[4:].tolist() == [0.0, 0.0]


def test_scale_huber_and_policy_weight() -> None:
    t = replace(transitions(), residual_scale=torch.full((B,), 0.5), policy_weight=torch.full((B,), 0.25))
    output = dag_db(huber=1.0)(t)
    z = expected_residual(t) / 0.5
    torch.testing.assert_close(output.loss, torch.where(z.abs() <= 1, z.square(), 2 * z.abs() - 1))
    output.loss.sum().backward()
    torch.testing.assert_close(t.log_F_tilde.grad, 2 * z.clamp(-1, 1) / 0.5)  # type: ignore[union-attr]
    torch.testing.assert_close(t.log_pf.grad, 0.25 * 2 * z.clamp(-1, 1) / 0.5)


def test_penalty_is_smooth_at_its_bend() -> None:
    x = torch.tensor([0.999, 1.001], dtype=torch.float64, requires_grad=True)
    loss = penalty(x, 1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    loss = loss.detach()
    assert float(loss[1] - loss[0]) == pytest.approx(0.004, rel=1e-2)
    assert float(gradient[1] - gradient[0]) == pytest.approx(0.002, abs=1e-3)


def test_dag_kl_on_policy_gradient_is_the_score_function_form() -> None:
    """d loss / d log P_F = -A = delta - baseline, half of DAG-DB's; the flow is fitted with log P_F as data."""
    objective, t = dag_kl(), transitions()
    residuals = expected_residual(t)[:, None]
    advantage = objective.advantages(known(residuals))
    t = replace(t, advantage=advantage[:, 0])
    objective(t).loss.sum().backward()
    others = (residuals.sum() - residuals) / (B - 1)
    torch.testing.assert_close(t.log_pf.grad, (residuals - others)[:, 0])
    torch.testing.assert_close(t.log_F_tilde.grad, 2 * expected_residual(t))  # type: ignore[union-attr]


def test_dag_kl_gradient_matches_the_closed_form_kl_of_a_gaussian() -> None:
    """E[(delta - b) grad log P_F] = grad KL(N(mu, s) || N(0, 1)) = mu, within five standard errors."""
    n, mean, std = 200_000, 0.7, 0.8
    mu = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
    x = mean + std * torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    log_pf = torch.distributions.Normal(mu, std).log_prob(x)
    log_target = torch.distributions.Normal(0.0, 1.0).log_prob(x)
    zeros = torch.zeros(n, dtype=torch.float64)
    delta = (log_pf - log_target).detach()
    objective = dag_kl()
    t = Transition(
        k=torch.zeros(n, dtype=torch.int64), is_terminal=torch.ones(n, dtype=torch.bool), log_pf=log_pf, log_pf_old=log_pf.detach(),
        log_pb=zeros, log_reward=log_target, log_F_tilde=zeros, log_F_tilde_next=zeros, log_looking=zeros, log_looking_next=zeros,
        advantage=objective.advantages(known(delta[:, None]))[:, 0],
    )  # fmt: skip
    objective(t).loss.mean().backward()
    score = (x - mean) / std**2
    error = float(((delta - delta.mean()) * score).std()) / n**0.5
    assert mu.grad is not None
    assert abs(float(mu.grad) - mean) < 5 * error


def test_published_kl_switches() -> None:
    residuals = torch.randn(4, 3, dtype=torch.float64)
    mixed = dag_kl(baseline="mixed", normalise_advantage=True, advantage_clip=0.5).advantages(known(residuals))
    rows = residuals.reshape(-1)
    centred = rows - (rows.sum() - rows) / 11
    spread = ((centred.square().sum() - centred.square()) / 11).sqrt()
    assert float(mixed.abs().max()) == 0.5
    inside = mixed.reshape(-1).abs() < 0.5
    assert bool(inside.any())
    # The spread is about each row's leave-one-out mean, which is only close to the common mean.
    torch.testing.assert_close(mixed.reshape(-1)[inside], -(centred / spread)[inside], rtol=0.1, atol=1e-6)


def test_the_running_baseline_needs_no_other_row() -> None:
    residuals, scale = torch.tensor([[3.0, 8.0]]), torch.tensor([2.0, 4.0])
    found = dag_kl(baseline="running").advantages(known(residuals, scale, torch.tensor([1.0, -4.0])))
    assert found.tolist() == [[-(3.0 - 1.0) / 2, -(8.0 + 4.0) / 4]]
    clipped = dag_kl(baseline="running", advantage_clip=2.0).advantages(
        known(residuals, scale, torch.tensor([1.0, -4.0]))
    )
    assert clipped.tolist() == [[-1.0, -2.0]]


def test_clipped_surrogate_is_pessimistic_on_both_sides() -> None:
    log_ratio = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64)).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss, clipped = clipped_surrogate(advantage, log_ratio, 0.2)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.2, 1.5, -0.5, 0.8], dtype=torch.float64))
    assert clipped.all()
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert gradient.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])


def test_ddpo_advantages_are_normalised_and_remembered_per_prompt() -> None:
    reward, prompt = torch.tensor([1.0, 2.0, 11.0, 12.0]), torch.tensor([0, 0, 1, 1])
    overall = OBJECTIVES["ddpo"](PolicyGradient(name="ddpo")).observe(reward, prompt)
    assert float(overall.mean()) == pytest.approx(0, abs=1e-6)
    assert float(overall.std(correction=0)) == pytest.approx(1, abs=1e-4)
    each = OBJECTIVES["ddpo"](PolicyGradient(name="ddpo", per_prompt=4))
    assert each.observe(reward, prompt).tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-4)
    restored = OBJECTIVES["ddpo"](PolicyGradient(name="ddpo", per_prompt=4))
    restored.load_state_dict(each.state_dict())
    assert torch.equal(restored.observe(reward, prompt), each.observe(reward, prompt))


def test_ratio_is_one_on_policy() -> None:
    for objective in (dag_db(), dag_kl(), OBJECTIVES["ddpo"](PolicyGradient(name="ddpo"))):
        assert objective(transitions()).ratio.eq(1).all()
