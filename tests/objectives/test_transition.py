"""The algebra of detailed balance over the transitions of a chain."""

import pytest
import torch
from dag_kernels import PLAIN

from dag.objectives import transition


def table(seed: int, N: int = 5, T: int = 7) -> torch.Tensor:
    return torch.randn(N, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_detailed_balance_telescopes_to_trajectory_balance() -> None:
    """sum_k delta_k = log F(x_T) + sum log P_F - sum log P_B - log R, since the inner flows cancel."""
    log_F, log_looking, log_pf, log_pb = (table(seed) for seed in range(4))
    log_reward = table(9)[:, 0]
    residuals = transition.residual_table(log_F, log_looking, log_pf, log_pb, log_reward)
    trajectory_balance = log_F[:, 0] + log_looking[:, 0] + log_pf.sum(1) - log_pb.sum(1) - log_reward
    torch.testing.assert_close(residuals.sum(1), trajectory_balance, rtol=0, atol=1e-10)


def test_forward_looking_is_a_reparametrisation() -> None:
    """The residual depends on log F alone, not on how it is split into a learnt and a forward-looking part."""
    log_F, log_looking, log_pf, log_pb = (table(seed) for seed in range(4))
    log_reward = table(9)[:, 0]
    plain = transition.residual_table(log_F, torch.zeros_like(log_F), log_pf, log_pb, log_reward)
    split = transition.residual_table(log_F - log_looking, log_looking, log_pf, log_pb, log_reward)
    torch.testing.assert_close(plain, split, rtol=0, atol=1e-12)


def test_constant_shift_centres_every_step() -> None:
    log_F, log_looking, log_pf, log_pb = (table(seed) for seed in range(4))
    log_pf = log_pf + 100 * torch.arange(7)  # a mean that depends on the step, as in a real chain
    log_reward = table(9)[:, 0]
    shift = transition.constant_shift(transition.residual_table(log_F, log_looking, log_pf, log_pb, log_reward))
    centred = transition.residual_table(log_F + shift, log_looking, log_pf, log_pb, log_reward)
    torch.testing.assert_close(centred.mean(0), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-10)


def test_terminal_transition_uses_the_reward_and_ignores_the_flow_net() -> None:
    nothing = torch.zeros(2)
    found = PLAIN.detailed_balance(
        log_F=torch.tensor([1.0, 2.0]), log_pf=nothing, log_pb=nothing, log_F_next=torch.tensor([3.0, 1e9]),
        log_looking=torch.tensor([0.5, 0.25]), log_looking_next=torch.tensor([0.125, 1e9]),
        log_reward=torch.tensor([5.0, 7.0]), is_terminal=torch.tensor([False, True]),
    )  # fmt: skip
    assert found.residual.tolist() == [1.5 - 3.125, 2.25 - 7.0]


def test_leave_one_out_mean() -> None:
    values = table(1)
    expected = torch.stack([torch.cat([values[:i], values[i + 1 :]]).mean(0) for i in range(5)])
    torch.testing.assert_close(transition.leave_one_out_mean(values), expected, rtol=0, atol=1e-12)
    advantages = values - transition.leave_one_out_mean(values)
    torch.testing.assert_close(advantages.sum(0), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        transition.leave_one_out_mean(values[:1])


def test_leave_one_out_std_is_unbiased_in_scale() -> None:
    """For many rows the leave-one-out standard deviation tends to the ordinary one."""
    values = 3 * table(2, N=4000, T=1)
    torch.testing.assert_close(transition.leave_one_out_std(values).mean(), values.std(), rtol=2e-3, atol=0)
