"""What a higher reward was paid with: diversity, the prompt's subject, alignment. The rules and thresholds of every warning."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Diversity that falls by more than this share of its first value is a price.
_DIVERSITY_FALL = 1 / 3
# noun_top1 of some dozen pictures moves by a few hundredths without any cause.
_NOUN_FALL = 0.05
# Alignment must fall by more than twice what other seeds of the base model change, and by more than this share.
_ALIGNMENT_FALL = 0.02
DIVERSITY, NOUN, ALIGNMENT = "diversity", "noun_top1", "alignment"
Measures = Mapping[str, Any]


@dataclass(frozen=True)
class Price:
    """A measure that fell by more than chance explains."""

    measure: str
    """DIVERSITY, NOUN or ALIGNMENT."""
    before: float
    after: float


@dataclass(frozen=True)
class Judgement:
    """Rows of `dag.evaluate`: the base model, the base model with other seeds if it was drawn so, and the trained one."""

    base: Measures
    trained: Measures
    again: Measures | None = None


def prices(first: Measures, last: Measures, judged: Judgement | None = None) -> Iterator[Price]:
    """Yield each measure that fell, once: as the run's own evaluation saw it, else as the judgement did.

    Args:
        first, last: metrics of the first and the last evaluation of the run. Only diversity is a price if the reward fell.
    """
    rewards = _pair("eval_reward_mean", first, last)
    has_risen = rewards is not None and rewards[1] > rewards[0]
    pairs = [(first, last), *([(judged.base, judged.trained)] if judged else [])]
    for measure in (DIVERSITY, NOUN, ALIGNMENT):
        for before, after in pairs:
            found = _pair(measure, before, after)
            if found is None or (measure != DIVERSITY and not has_risen):
                continue
            if found[0] - found[1] > _allowed(measure, found[0], judged):
                yield Price(measure, *found)
                break


def _pair(key: str, before: Measures, after: Measures) -> tuple[float, float] | None:
    """The two values of a measure; None if one was not taken."""
    was, now = before.get(key), after.get(key)
    return (was, now) if isinstance(was, int | float) and isinstance(now, int | float) else None


def _allowed(measure: str, before: float, judged: Judgement | None) -> float:
    """How much a measure may fall without being a price."""
    if measure == DIVERSITY:
        return _DIVERSITY_FALL * before
    if measure == NOUN:
        return _NOUN_FALL
    seeds = _pair(measure, judged.base, judged.again) if judged is not None and judged.again is not None else None
    return max(2 * abs(seeds[0] - seeds[1]) if seeds else 0.0, _ALIGNMENT_FALL * abs(before))
