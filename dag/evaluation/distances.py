"""Statistics of sets of pictures from their features: how diverse a set is, and how far two sets are from each other.

Legend: N pictures (M in a second set), D features, P prompts with n pictures each. Features are float32 rows. Vendi score
and distances between sets are computed in float64.

The published statistics are computed here, not by a library. torchmetrics, ignite and scipy take the root of a singular
matrix where N < D, which costs the Frechet distance eight digits; torchmetrics' kernel distance needs N = M; vendi-score
would add scipy and scikit-learn for four lines of code. tests/by_hand/published_statistics.py compares them.
"""

import torch
from torch import Tensor


def within_prompt_diversity(features: Tensor, images_per_prompt: int) -> float:
    """1 - mean pairwise cosine between different pictures of the same prompt.

    Args:
        features: (P * n, D) unit vectors, the n pictures of a prompt side by side.
    """
    grouped = features.reshape(-1, images_per_prompt, features.shape[-1])
    cosine = torch.einsum("pid,pjd->pij", grouped, grouped)
    different = ~torch.eye(images_per_prompt, dtype=torch.bool)
    return float(1 - cosine[:, different].mean())


def vendi_score(features: Tensor) -> float:
    """The effective number of different pictures, 1 .. N (Friedman and Dieng, TMLR 2023, order 1).

    It is exp of the entropy of the eigenvalues of K / N, where K holds the pairwise cosines.

    Args:
        features: (N, D) unit vectors.
    """
    rows = features.double()
    # K / N and its D x D dual have the same eigenvalues except for zeros, so the smaller one is solved.
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    eigenvalues = torch.linalg.eigvalsh(gram / len(rows))
    share = eigenvalues[eigenvalues > 0]
    return float((-(share * share.log()).sum()).exp())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), unbiased covariances (Heusel et al. 2017, squared).

    It depends on the number of pictures: even between two samples of one distribution it is above zero, and falls as they
    grow. So compare sets of equal size, and report the distance between two samples of one distribution beside it.

    Args:
        a, b: (N, D), (M, D)
    """
    a, b = a.double(), b.double()
    # With C = X^T X, tr (C_a C_b)^(1/2) is the sum of the singular values of X_a X_b^T. This avoids the square root of a
    # matrix that is singular where N < D.
    x_a, x_b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    overlap = torch.linalg.svdvals(x_a @ x_b.T).sum()
    spread = x_a.square().sum() + x_b.square().sum() - 2 * overlap
    return float((a.mean(0) - b.mean(0)).square().sum() + spread)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    The estimate is unbiased: its mean is zero for two samples of one distribution.

    Args:
        a, b: (N, D), (M, D)
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def between_different(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(between_different(a) + between_different(b) - 2 * kernel(a, b).mean())
