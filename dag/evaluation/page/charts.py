"""The curves of a run as data, which the page's script draws. Only what was measured is there."""

from collections.abc import Sequence
from typing import Any

from dag.evaluation.page.facts import Facts

Panel = dict[str, Any]
"""One chart: id, title, note, whether its axis is logarithmic, and its series: name, points [epoch, value], perhaps a band."""

# Lines for single steps; a chart with more cannot be read.
_MOST_STEPS = 8
# Values whose largest is so many times the smallest are drawn on a logarithmic axis.
_LOGARITHMIC = 50


def panels(facts: Facts) -> list[Panel]:
    """The charts of a run, in the order of the page."""
    rewards = {key: key.removeprefix("eval_reward_") for row in facts.rows for key in row if _is_single_reward(key)}
    critic = {
        "critic_correlation": "correlation with the reward, after its training",
        "critic_correlation_before": "before its training",
        "critic_cosine": "cosine with the exact gradient",
    }
    found = [
        _panel("reward", "Reward", "What is trained for.", [*_rollouts(facts), *_lines(facts, _EVALUATED)]),
        _panel("rewards", "Rewards one by one", "Of the fixed evaluation, unweighted.", _lines(facts, rewards)),
        _panel(
            "diversity",
            "Diversity",
            "1 - the mean cosine between pictures of one prompt. Falling: they become alike.",
            _lines(facts, {"diversity": "within a prompt"}),
        ),
        _panel(
            "noun",
            "Subject",
            "Share of pictures in which a separate judge sees the prompt's noun.",
            _lines(facts, {"noun_top1": "first guess (noun_top1)", "noun_top5": "among five (noun_top5)"}),
        ),
        _panel(
            "kl",
            "KL to the pretrained model, by step",
            "Nats a step. A step far above the others carries the change alone.",
            _steps(facts, "pretrained_kl_per_step"),
        ),
        _panel("update", "KL of an update", "Nats a transition.", _lines(facts, {"update_kl": "before the bound"})),
        _panel("residual", "Residual", "Nats, rms over all steps. It should not keep growing.", _residual(facts)),
        _panel(
            "residuals",
            "Residual by step",
            "Nats, rms. A step that stays high is one that the flow does not follow.",
            _steps(facts, "residual_rms_per_step"),
        ),
        _panel("critic", "Critic", "Below 0.8 its gradient says little.", _lines(facts, critic)),
    ]
    return [panel for panel in found if panel["series"]]


_EVALUATED = {"eval_reward_mean": "fixed evaluation"}


def _is_single_reward(key: str) -> bool:
    return key.startswith("eval_reward_") and key not in ("eval_reward_mean", "eval_reward_std")


def _panel(name: str, title: str, note: str, series: list[dict[str, Any]]) -> Panel:
    values = [value for one in series for _, value in one["points"]]
    is_log = bool(values) and min(values) > 0 and max(values) > _LOGARITHMIC * min(values)
    return {"id": name, "title": title, "note": note, "log": is_log, "series": series}


def _rollouts(facts: Facts) -> list[dict[str, Any]]:
    """The mean reward of the rollouts, with a band of one standard deviation."""
    lines = _lines(facts, {"reward_mean": "rollouts (mean, 1 sd)"})
    spreads = dict(facts.values("reward_std"))
    for one in lines:
        one["band"] = [[_short(y - spreads.get(x, 0.0)), _short(y + spreads.get(x, 0.0))] for x, y in one["points"]]
    return lines


def _residual(facts: Facts) -> list[dict[str, Any]]:
    return _lines(facts, {"residual_rms": "all steps"})


def _lines(facts: Facts, names: dict[str, str]) -> list[dict[str, Any]]:
    """One series for each key that was measured, by the name to show."""
    found = {name: facts.values(key) for key, name in names.items()}
    return [{"name": name, "points": [[x, _short(y)] for x, y in values]} for name, values in found.items() if values]


def _steps(facts: Facts, key: str) -> list[dict[str, Any]]:
    """One series for each step of the chain, at most eight of them, evenly spaced; `shade` goes from 0 (noisiest) to 1."""
    rows = [(row["epoch"], row[key]) for row in facts.rows if isinstance(row.get(key), list)]
    count = max((len(values) for _, values in rows), default=0)
    series = []
    for k in spread(count, _MOST_STEPS):
        points = [
            [epoch, _short(values[k])]
            for epoch, values in rows
            if k < len(values) and isinstance(values[k], int | float)
        ]
        which = {0: " (noisiest)", count - 1: " (cleanest)"}.get(k, "")
        if points:
            series.append({"name": f"step {k}{which}", "points": points, "shade": k / max(count - 1, 1)})
    return series


def spread(count: int, most: int) -> Sequence[int]:
    """At most `most` of the numbers below `count`, evenly spaced, with the first and the last."""
    if count <= most:
        return range(count)
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _short(value: float) -> float:
    """Six significant digits: what a chart can show."""
    return float(f"{value:.6g}")
