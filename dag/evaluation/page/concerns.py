"""What a person should worry about in a run, in plain words."""

from collections.abc import Iterator, Sequence
from typing import Any

from dag.evaluation.measure import BASE, BASE_AGAIN
from dag.evaluation.page.facts import DONE, Facts
from dag.evaluation.prices import ALIGNMENT, DIVERSITY, Judgement, Price, prices

# Residuals of the last quarter against those of the first one, without the first epoch, in which the flow is not fitted yet.
_RESIDUAL_GROWTH, _FEWEST_RESIDUALS = 1.5, 5


def concerns(facts: Facts) -> list[str]:
    """A sentence or two for each concern, the gravest first."""
    return [
        *map(_sentence, prices(*_ends(facts), _judgement(facts))),
        *_reward(facts),
        *_residuals(facts),
        *_missing(facts),
        *facts.unreadable,
    ]


def _change(facts: Facts, key: str) -> tuple[float, float] | None:
    """The first and the last value of a key; None if it was not measured twice."""
    values = facts.values(key)
    return (values[0][1], values[-1][1]) if len(values) > 1 else None


def _ends(facts: Facts) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last value of what evaluations measure."""
    keys = ("eval_reward_mean", "diversity", "noun_top1")
    changes = {key: change for key in keys if (change := _change(facts, key)) is not None}
    return {key: first for key, (first, _) in changes.items()}, {key: last for key, (_, last) in changes.items()}


def _judgement(facts: Facts) -> Judgement | None:
    """The rows of the newest judgement that concern this run; None if there is none of it."""
    models = {str(row.get("model")): row for row in (facts.judged.models if facts.judged else [])}
    base, own = models.get(BASE), models.get(facts.run.path.resolve().name)
    return None if base is None or own is None else Judgement(base, own, models.get(BASE_AGAIN))


def _sentence(price: Price) -> str:
    was, now = price.before, price.after
    if price.measure == DIVERSITY:
        return (
            f"Diversity fell by {100 * (1 - now / was):.0f} %, from {was:.3f} to {now:.3f}: pictures of one prompt look alike "
            "now. An earlier checkpoint, a smaller beta or a regulariser keeps more of it."
        )
    if price.measure == ALIGNMENT:
        return (
            f"The reward rises while the pictures follow their prompts less: alignment is {now:.1f}, and was {was:.1f} for "
            "the base model."
        )
    return (
        f"The reward rises while the subject is lost: the judge saw the prompt's noun in {100 * was:.0f} % of the pictures before "
        f"training and sees it in {100 * now:.0f} % now (noun_top1). The reward may be bought by something else."
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
