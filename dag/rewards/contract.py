"""Whether a reward keeps its contract: one check after the other on a few made-up pictures, for `python -m dag.score --check`.

Legend: B pictures (B, 3, H, W) in [0, 1]: a black one, a white one, a coloured slope and noise, each with a prompt.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dag.rewards.registry import Reward
from dag.rewards.tower import TowerReward

SIDE = 256
_PROMPTS = ("a cat", "a red bus", "two zebras", "", "a café at night", "the sea")
# Scores of the same picture may differ by this share of the spread of all scores: matrix products round differently by batch.
_ROUNDING = 1e-3
# A step along the gradient, root mean square of the pixels, and how far the slope may be off what the gradient says.
_STEP, _SLOPE_ERROR = 1e-3, 0.2


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    title: str
    is_kept: bool
    found: str


class _BrokenError(Exception):
    """The reward breaks its contract; the message says what was found and what is asked."""


class _Probe:
    """A reward, the pictures that it is asked about, and its first answer."""

    def __init__(self, reward: Reward, device: torch.device) -> None:
        self.reward, self.prompts = reward, list(_PROMPTS)
        slope = torch.linspace(0, 1, SIDE)
        coloured = torch.stack(
            [slope.expand(SIDE, SIDE), slope[:, None].expand(SIDE, SIDE), torch.full((SIDE, SIDE), 0.5)]
        )
        noise = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        plain = [torch.full((1, 3, SIDE, SIDE), value) for value in (0.0, 1.0)]
        self.images = torch.cat([*plain, coloured[None], noise]).to(device)
        self.values, self.dtype, self.is_changed = torch.empty(0), torch.float32, False

    def ask(self, rows: list[int] | None = None) -> Tensor:
        """The scores of the pictures with these numbers, as training asks for them, on the CPU in float64."""
        rows = list(range(len(self.images))) if rows is None else rows
        with torch.no_grad():
            return self.reward(self.images[rows], [self.prompts[row] for row in rows]).cpu().double()

    def tolerance(self) -> float:
        spread = float(self.values.max() - self.values.min())
        return _ROUNDING * spread + 1e-6 * float(self.values.abs().max())


def contract(reward: Reward, device: torch.device) -> Iterator[Check]:
    """Yield the checks of a reward. Those that need an answer of the right form are left out if the first ones fail."""
    probe = _Probe(reward, device)
    for title, check in _CHECKS.items():
        try:
            yield Check(title, True, check(probe))
            continue
        except _BrokenError as error:
            yield Check(title, False, str(error))
        except Exception as error:
            yield Check(title, False, f"it raised {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        if title in _NEEDED:
            return


def _form(probe: _Probe) -> str:
    before, prompts = probe.images.clone(), list(probe.prompts)
    with torch.no_grad():
        values = probe.reward(probe.images, probe.prompts)
    B = len(prompts)
    if not isinstance(values, Tensor):
        raise _BrokenError(
            f"it returned {type(values).__name__}; a tensor of shape ({B},) is asked, one number a picture"
        )
    if values.shape != (B,):
        raise _BrokenError(f"it returned shape {tuple(values.shape)}; ({B},) is asked, one number a picture")
    probe.values = values.detach().cpu().double()
    probe.dtype = values.dtype
    probe.is_changed = not torch.equal(before, probe.images) or prompts != probe.prompts
    probe.images, probe.prompts = before, prompts
    return f"({B},) for {B} pictures of {SIDE} px"


def _dtype(probe: _Probe) -> str:
    if probe.dtype != torch.float32:
        raise _BrokenError(f"it returned {probe.dtype}; torch.float32 is asked: return values.float()")
    return "float32"


def _finite(probe: _Probe) -> str:
    names = ("black", "white", "a coloured slope", *["noise"] * 3)
    for name, value in zip(names, probe.values.tolist(), strict=True):
        if not math.isfinite(value):
            raise _BrokenError(f"{value} for a picture that is {name}; every number must be finite")
    black, white, slope, *noise = probe.values.tolist()
    return f"black {black:.4g}, white {white:.4g}, coloured slope {slope:.4g}, noise {noise[0]:.4g}"


def _input(probe: _Probe) -> str:
    if probe.is_changed:
        raise _BrokenError("it changed the pictures or the prompts that it was given: work on a copy (images.clone())")
    return "unchanged"


def _differs(probe: _Probe) -> str:
    if float(probe.values.max() - probe.values.min()) == 0:
        raise _BrokenError(f"all pictures score {float(probe.values[0]):.4g}: nothing can be learnt from that")
    return f"scores from {float(probe.values.min()):.4g} to {float(probe.values.max()):.4g}"


def _twice(probe: _Probe) -> str:
    return _equal(probe, probe.ask(), "asked again, the same pictures score")


def _alone(probe: _Probe) -> str:
    alone = torch.cat([probe.ask([row]) for row in range(len(probe.images))])
    return _equal(probe, alone, "asked one by one, they score")


def _order(probe: _Probe) -> str:
    rows = list(range(len(probe.images)))[::-1]
    return _equal(probe, probe.ask(rows).flip(0), "in another order, they score")


def _equal(probe: _Probe, again: Tensor, what: str) -> str:
    """A sentence about scores that should be those of the first answer."""
    if again.shape != probe.values.shape:
        raise _BrokenError(f"{what} shape {tuple(again.shape)}")
    difference = float((again - probe.values).abs().max())
    if not difference <= probe.tolerance():
        row = int((again - probe.values).abs().argmax())
        raise _BrokenError(f"{what} differently: {float(again[row]):.6g} instead of {float(probe.values[row]):.6g}")
    return "equal" if difference == 0 else f"equal up to {difference:.1g}"


def _prompts(probe: _Probe) -> str:
    other = probe.prompts
    probe.prompts = [f"a photo of {word}" for word in ("rain", "a fork", "Mars", "a violin", "an owl", "snow")]
    try:
        changed = (probe.ask() - probe.values).abs() > probe.tolerance()
    finally:
        probe.prompts = other
    return "used: other prompts change the scores" if bool(changed.any()) else "not used: other prompts change nothing"


def _gradient(probe: _Probe) -> str:
    images = probe.images[2:].clone().requires_grad_(True)
    # Rewards with a network give gradients only where they are asked to.
    options = {"grad": True} if isinstance(probe.reward, TowerReward) else {}
    with torch.enable_grad():
        values = probe.reward(images, probe.prompts[2:], **options)
    if not values.requires_grad:
        return "none reaches the pictures: objectives that want one learn it"
    (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True, materialize_grads=True)
    if not bool(gradient.isfinite().all()):
        raise _BrokenError("it has one, and that is not finite: detach the scores, or mend it")
    size = gradient.flatten(1).norm(dim=1)
    if float(size.max()) == 0:
        raise _BrokenError("it has one, and that is zero for every picture: detach the scores, or mend it")
    # In the direction of its gradient a picture's score rises by the gradient's norm.
    length = _STEP * gradient[0].numel() ** 0.5
    step = length * gradient / size.clamp(min=torch.finfo(torch.float32).tiny)[:, None, None, None]
    with torch.no_grad():
        higher, lower = (probe.reward(images + sign * step, probe.prompts[2:]) for sign in (0.5, -0.5))
    measured = (higher - lower).double().sum() / length
    ratio = float(measured / size.double().sum())
    if abs(ratio - 1) > _SLOPE_ERROR:
        raise _BrokenError(
            f"a step along it changes the scores by {ratio:.2g} of what it says: detach the scores, or mend it"
        )
    return "it has one, and a step along it changes the scores as it says"


_CHECKS: dict[str, Callable[[_Probe], str]] = {
    "shape": _form,
    "dtype": _dtype,
    "finite": _finite,
    "input": _input,
    "differs": _differs,
    "same twice": _twice,
    "one by one": _alone,
    "any order": _order,
    "prompts": _prompts,
    "gradient": _gradient,
}
_NEEDED = ("shape", "finite")
