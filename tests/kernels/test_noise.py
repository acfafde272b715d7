"""Counter-based noise: published values of the generator, moments, independence of the batch."""

import pytest
import torch
from dag_kernels import gaussian_log_prob, guided, philox_4x32, standard_normal


def counter(word: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    value = torch.tensor([word])
    return value, value, value, value


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_known_answers(word: int, key: int, expected: tuple[int, ...]) -> None:
    """The known answers that were published with the generator (Random123's kat_vectors)."""
    assert tuple(int(w) for w in philox_4x32(counter(word), key)) == expected


def test_philox_known_answer_with_distinct_words() -> None:
    words = tuple(torch.tensor([w]) for w in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
    found = philox_4x32(words, (0x299F31D0 << 32) | 0xA4093822)  # type: ignore[arg-type]
    assert tuple(int(w) for w in found) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_moments_of_a_million_normals() -> None:
    z = standard_normal(7, torch.arange(64), 3, (4, 64, 64)).double()
    n = z.numel()
    assert abs(float(z.mean())) < 5 / n**0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 5 * (96 / n) ** 0.5
    rows = z.flatten(1)
    correlation = (rows[:-1] * rows[1:]).mean()
    assert abs(float(correlation)) < 5 / n**0.5


def test_noise_does_not_depend_on_the_batch_it_is_drawn_in() -> None:
    ids = torch.tensor([5, 2**33 + 1, 0, 17])
    together = standard_normal(3, ids, 2, (4, 3, 5))
    for row, sample in enumerate(ids):
        assert torch.equal(together[row], standard_normal(3, sample[None], 2, (4, 3, 5))[0])


def test_every_coordinate_of_the_counter_matters() -> None:
    base = standard_normal(3, torch.tensor([1]), 2, (8,))
    others = [
        standard_normal(4, torch.tensor([1]), 2, (8,)),
        standard_normal(3 + 2**32, torch.tensor([1]), 2, (8,)),
        standard_normal(3, torch.tensor([2]), 2, (8,)),
        standard_normal(3, torch.tensor([1 + 2**32]), 2, (8,)),
        standard_normal(3, torch.tensor([1]), 3, (8,)),
    ]
    assert all(bool((other != base).all()) for other in others)


def test_gaussian_log_prob_gradcheck() -> None:
    x, mean = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    std = torch.tensor(0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: gaussian_log_prob(a, b, std), (x, mean))
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), expected, rtol=1e-12, atol=1e-12)


def test_guidance_one_is_the_conditional_branch() -> None:
    cond, uncond = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(guided(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guided(cond, uncond, 0.0), uncond)
