"""The slopes of the state flow: least squares against a dense solve, recovery, shrinkage of noise, degenerate rollouts."""

import pytest
import torch

from dag.objectives import transition
from dag.objectives.state_flow import StateFlow, norm_excess

T = 7
SLOPES = torch.tensor([-450.0, -300.0, -120.0, -40.0, 0.0, 25.0, 60.0], dtype=torch.float64)
CONSTANTS = torch.linspace(-30, 90, T, dtype=torch.float64)


def table(seed: int, N: int) -> torch.Tensor:
    return torch.randn(N, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def excesses(seed: int, N: int) -> torch.Tensor:
    """(N, T) q of chains whose neighbouring states resemble each other, with a mean that depends on the step."""
    return 0.05 * (table(seed, N).cumsum(1) + torch.linspace(0, 3, T, dtype=torch.float64))


def moved(residuals: torch.Tensor, excess: torch.Tensor, constants: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """The residuals after adding c_k + a_k q_k to log F~, written out step by step."""
    result = residuals.clone()
    for k in range(T):
        result[:, k] += constants[k] + slopes[k] * excess[:, k]
        if k > 0:
            result[:, k - 1] -= constants[k] + slopes[k] * excess[:, k]
    return result


def test_norm_excess_is_zero_for_a_mean_square_of_one() -> None:
    x = torch.stack([torch.ones(4, 8, 8), 2 * torch.ones(4, 8, 8)]).half()
    assert norm_excess(x).tolist() == [0.0, 3.0]
    assert norm_excess(x).dtype == torch.float32


def test_the_flow_adds_its_slope_times_the_excess() -> None:
    x, k, text = torch.randn(3, 4, 8, 8), torch.tensor([0, 2, 1]), torch.zeros(3, 2, 5)
    flow, plain = StateFlow(4, 5, T, (8,), has_slopes=True), StateFlow(4, 5, T, (8,))
    plain.load_state_dict({name: value for name, value in flow.state_dict().items() if name != "slopes"})
    assert flow.slopes is not None and plain.slopes is None
    assert torch.equal(flow(x, k, k, text), plain(x, k, k, text))
    flow.slopes += torch.linspace(-3, 3, T)
    expected = plain(x, k, k, text) + flow.slopes[k] * (x.square().sum((1, 2, 3)) / 256 - 1)
    torch.testing.assert_close(flow(x, k, k, text), expected, rtol=1e-5, atol=1e-5)


def test_a_flow_without_slopes_loads_what_earlier_versions_saved() -> None:
    """Their state has no entry `slopes`, and a run without slopes saves none."""
    saved = StateFlow(4, 5, T, (8,)).state_dict()
    assert "slopes" not in saved
    StateFlow(4, 5, T, (8,)).load_state_dict(saved)
    assert StateFlow(4, 5, T, (8,), has_slopes=True).state_dict()["slopes"].tolist() == [0.0] * T


def test_with_slopes_moves_the_residuals_of_both_neighbours() -> None:
    residuals, excess = table(0, 5), excesses(1, 5)
    expected = moved(residuals, excess, torch.zeros(T), SLOPES)
    torch.testing.assert_close(transition.with_slopes(residuals, excess, SLOPES), expected, rtol=0, atol=1e-10)


def test_the_normal_equations_are_those_of_the_dense_least_squares() -> None:
    """Constants and slopes as unknowns of one design matrix with N * T rows, each weighted by 1 / sqrt(s_k s)."""
    N = 40
    residuals, excess = table(0, N) * torch.linspace(1, 9, T), excesses(1, N)
    spread = residuals.std(0, correction=0)
    weight = (spread * spread.mean()).rsqrt()
    units = torch.eye(2 * T, dtype=torch.float64)
    columns = [moved(torch.zeros_like(residuals), excess, unit[:T], unit[T:]) * weight for unit in units]
    design = torch.stack([column.flatten() for column in columns], dim=1)
    found = torch.linalg.lstsq(design, -(residuals * weight).flatten()[:, None]).solution[:, 0]
    A, b = transition._normal_equations(residuals, excess)
    slopes = torch.linalg.solve(A, b)
    torch.testing.assert_close(slopes, found[T:], rtol=1e-8, atol=1e-8)
    constants = transition.constant_shift(transition.with_slopes(residuals, excess, slopes))
    torch.testing.assert_close(constants, found[:T], rtol=1e-8, atol=1e-8)


def test_known_constants_and_slopes_are_recovered() -> None:
    """The first fit is shrunk by about 1 / N; the next ones find what it has left."""
    N = 200
    excess = excesses(3, N)
    residuals = moved(torch.zeros(N, T, dtype=torch.float64), excess, -CONSTANTS, -SLOPES)
    first = transition.slope_shift(residuals, excess)
    torch.testing.assert_close(first, SLOPES, rtol=0.02, atol=4)
    slopes = torch.zeros_like(SLOPES)
    for _ in range(8):
        slopes += transition.slope_shift(transition.with_slopes(residuals, excess, slopes), excess)
    torch.testing.assert_close(slopes, SLOPES, rtol=0, atol=1e-3)
    constants = transition.constant_shift(transition.with_slopes(residuals, excess, slopes))
    torch.testing.assert_close(constants, CONSTANTS, rtol=0, atol=1e-3)


def test_slopes_of_noise_are_shrunk_and_most_are_zero() -> None:
    """The first three steps have slopes, the last three residuals are noise that no slope explains."""
    N, late = 64, slice(T - 3, T)
    slopes = torch.where(torch.arange(T) < 3, SLOPES, 0.0)
    shrunk, plain = [], []
    for seed in range(20):
        excess = excesses(100 + seed, N)
        residuals = moved(20 * table(200 + seed, N), excess, -CONSTANTS, -slopes)
        shrunk.append(transition.slope_shift(residuals, excess)[late])
        plain.append(torch.linalg.solve(*transition._normal_equations(residuals, excess))[late])
    found, unshrunk = torch.stack(shrunk), torch.stack(plain)
    # The estimate of a slope of noise is larger than its own standard deviation in a third of all cases.
    assert float((found == 0).double().mean()) > 0.5
    assert float(found.square().mean() / unshrunk.square().mean()) < 0.5


@pytest.mark.parametrize("N", [2, 3, 4])
def test_few_trajectories_give_finite_slopes(N: int) -> None:
    residuals, excess = 20 * table(5, N).float(), excesses(6, N).float()
    assert bool(transition.slope_shift(residuals, excess).isfinite().all())


def test_states_of_equal_norm_have_no_slopes() -> None:
    equal = torch.ones(8, T)
    assert transition.slope_shift(table(7, 8).float(), equal).tolist() == [0.0] * T
    assert transition.slope_shift(equal, excesses(8, 8).float()).tolist() == [0.0] * T
