"""Statistics of pictures' features, against closed forms and direct definitions."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dag.evaluation.distances import frechet_distance, kernel_distance, vendi_score, within_prompt_diversity


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_diversity_of_equal_and_of_orthogonal_features() -> None:
    same = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    assert within_prompt_diversity(same, 2) == pytest.approx(0.0)
    crossed = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert within_prompt_diversity(crossed, 2) == pytest.approx(1.0)
    assert within_prompt_diversity(crossed[[0, 2, 1, 3]], 2) == pytest.approx(0.0)


def test_vendi_counts_different_pictures() -> None:
    basis = torch.eye(5)
    assert vendi_score(basis) == pytest.approx(5)
    assert vendi_score(basis[[0, 0, 0, 0]]) == pytest.approx(1)
    assert vendi_score(basis[[0, 0, 1, 1, 2, 2]]) == pytest.approx(3)
    # Two different pictures with shares 3/4 and 1/4: exp of their entropy.
    assert vendi_score(basis[[0, 0, 0, 1]]) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))


@pytest.mark.parametrize(("count", "width"), [(8, 32), (32, 8)])
def test_vendi_is_the_entropy_of_the_kernels_eigenvalues(count: int, width: int) -> None:
    features = functional.normalize(rows(count, width), dim=1)
    eigenvalues = np.linalg.eigvalsh((features @ features.T).double().numpy() / count).clip(1e-300)
    assert vendi_score(features) == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()), rel=1e-5)


def test_frechet_of_a_shift_and_of_a_scale() -> None:
    a = rows(50, 6)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + shift) == pytest.approx(25, rel=1e-5)
    # Scaling by 2 about the mean: sqrt(C * 4 C) = 2 C, so tr(C + 4 C - 4 C) is left.
    centred = a - a.mean(0)
    assert frechet_distance(centred, 2 * centred) == pytest.approx(float(centred.double().var(0).sum()), rel=1e-5)


@pytest.mark.parametrize(("n", "m", "width"), [(200, 150, 5), (20, 30, 64)])
def test_frechet_is_its_definition_with_a_matrix_square_root(n: int, m: int, width: int) -> None:
    """This includes fewer pictures than features, where both covariances are singular."""
    a, b = rows(n, width).double().numpy(), (1.5 * rows(m, width, seed=1) + 0.3).double().numpy()
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(c_a @ c_b).astype(complex)).real.sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c_a + c_b) - 2 * root
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(torch.from_numpy(b), torch.from_numpy(a)) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_is_its_sum_over_pairs() -> None:
    a, b = rows(7, 3).double(), rows(5, 3, seed=1).double()

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_a = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-9)


def test_kernel_distance_is_zero_in_the_mean_for_one_distribution() -> None:
    values = [kernel_distance(rows(40, 4, seed), rows(40, 4, 1000 + seed)) for seed in range(100)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 10
    assert kernel_distance(rows(40, 4), rows(40, 4, 1) + 1) > max(values)
