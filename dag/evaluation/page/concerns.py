"""What a person should worry about in a run, in plain words."""

from collections.abc import Iterator, Sequence
from typing import Any

from dag.evaluation.page.facts import DONE, Facts

# Diversity that falls by more than this share of its first value is a concern.
_DIVERSITY_FALL = 1 / 3
# noun_top1 of some dozen pictures moves by a few hundredths without any cause.
_NOUN_FALL = 0.05
# Alignment must fall by more than twice what other seeds of the base model change, and by more than this share.
_ALIGNMENT_FALL = 0.02
# Residuals of the last quarter against those of the first one, without the first epoch, in which the flow is not fitted yet.
_RESIDUAL_GROWTH, _FEWEST_RESIDUALS = 1.5, 5


def concerns(facts: Facts) -> list[str]:
    """A sentence or two for each concern, the gravest first."""
    return [
        *_diversity(facts),
        *_subject(facts),
        *_alignment(facts),
        *_reward(facts),
        *_residuals(facts),
        *_missing(facts),
        *facts.unreadable,
    ]


def _change(facts: Facts, key: str) -> tuple[float, float] | None:
    """The first and the last value of a key; None if it was not measured twice."""
    values = facts.values(key)
    return (values[0][1], values[-1][1]) if len(values) > 1 else None


def _has_risen(facts: Facts) -> bool:
    change = _change(facts, "eval_reward_mean")
    return change is not None and change[1] > change[0]


def _diversity(facts: Facts) -> Iterator[str]:
    change = _change(facts, "diversity")
    if change is not None and change[1] < (1 - _DIVERSITY_FALL) * change[0]:
        lost = 100 * (1 - change[1] / change[0])
        yield (
            f"Diversity fell by {lost:.0f} %, from {change[0]:.3f} to {change[1]:.3f}: pictures of one prompt look alike now. "
            "An earlier checkpoint, a smaller beta or a regulariser keeps more of it."
        )


def _subject(facts: Facts) -> Iterator[str]:
    change = _change(facts, "noun_top1")
    if change is not None and _has_risen(facts) and change[1] < change[0] - _NOUN_FALL:
        first, last = (f"{100 * share:.0f} %" for share in change)
        yield (
            f"The reward rises while the subject is lost: the judge saw the prompt's noun in {first} of the pictures before "
            f"training and sees it in {last} now (noun_top1). The reward may be bought by something else."
        )


def _alignment(facts: Facts) -> Iterator[str]:
    models = {str(row.get("model")): row.get("alignment") for row in (facts.judged.models if facts.judged else [])}
    base, again = models.get("base"), models.get("base, other seeds")
    own = models.get(facts.run.path.resolve().name)
    known = [value for value in (base, again, own) if isinstance(value, int | float)]
    if len(known) < 3 or not _has_risen(facts):
        return
    base, again, own = known
    if base - own > max(2 * abs(base - again), _ALIGNMENT_FALL * abs(base)):
        yield (
            f"The reward rises while the pictures follow their prompts less: alignment is {own:.1f}, and was {base:.1f} for "
            "the base model."
        )


def _reward(facts: Facts) -> Iterator[str]:
    change = _change(facts, "eval_reward_mean")
    if change is not None and change[1] <= change[0]:
        yield f"The evaluated reward has not risen: {change[0]:.4g} before training, {change[1]:.4g} now."


def _residuals(facts: Facts) -> Iterator[str]:
    values = [value for _, value in facts.values("residual_rms")][1:]
    if len(values) < _FEWEST_RESIDUALS - 1:
        return
    quarter = len(values) // 4
    first, last = _mean(values[:quarter]), _mean(values[-quarter:])
    if last > _RESIDUAL_GROWTH * first:
        yield (
            f"Residuals grow: their rms was {first:.3g} nats early in training and is {last:.3g} now. The policy moves away "
            "from its target faster than the state flow follows; a smaller learning rate helps."
        )


def _mean(values: Sequence[Any]) -> float:
    return sum(values) / len(values)


def _missing(facts: Facts) -> Iterator[str]:
    if facts.rows and not facts.values("eval_reward_mean"):
        yield "There is no fixed evaluation, so nothing tells the reward of pictures with equal seeds before and after."
    elif facts.rows and not facts.values("diversity"):
        yield "Diversity was not measured (evaluation.diversity), so a loss of it would not show here."
    if facts.status == DONE and facts.judged is None:
        yield "The finished run is not judged in this folder: other rewards and prompt alignment are unknown (see Judged)."
