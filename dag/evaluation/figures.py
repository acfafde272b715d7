"""Figures and tables of a study: curves with their spread over seeds, the trade-off of reward and diversity, one HTML page."""

import base64
import csv
import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dag.evaluation.curves import Rows, at_reward, ends, evaluated, trained

# A legend with more entries is drawn beside the axes.
_MOST_INSIDE = 4


@dataclass(frozen=True)
class Line:
    """One line of a figure: the runs of one method."""

    name: str
    runs: tuple[Rows, ...]
    """The rows of metrics.jsonl of each run, one run for each seed."""


def common_reward(lines: Sequence[Line]) -> float | None:
    """The highest reward of the fixed evaluation that all runs of all lines reach.

    None where that is no gain: some run began above it.
    """
    curves = [[row["eval_reward_mean"] for row in evaluated(run)] for line in lines for run in line.runs]
    level = min(map(max, curves))
    return level if level > max(curve[0] for curve in curves) else None


# -- tables -------------------------------------------------------------------------------------------------------


def summary(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A table with one row for each method: means over seeds, and standard deviations in columns that end in `_sd`."""
    level = common_reward(lines)
    table = []
    for line in lines:
        first, last = ([ends(run)[i] for run in line.runs] for i in (0, 1))
        finals = [evaluated(run)[-1] for run in line.runs]
        seconds = [
            sum(value for row in run for key, value in row.items() if key.startswith("seconds_")) for run in line.runs
        ]
        row: dict[str, Any] = {
            "method": line.name,
            "seeds": len(line.runs),
            "reward_first": mean(first),
            "reward_last_quarter": mean(last),
            "reward_last_quarter_sd": _sd(last),
            "eval_reward": mean([final["eval_reward_mean"] for final in finals]),
            "equal_reward": level,
        }
        for key in ("diversity", "noun_top1"):
            row[key] = mean([final.get(key) for final in finals])
            row[f"{key}_at_equal_reward"] = mean(
                [None if level is None else at_reward(run, level, key) for run in line.runs]
            )
        row["trajectories"] = max(trained(run)[-1]["trajectories"] for run in line.runs)
        row["updates"] = max(trained(run)[-1]["optimizer_step"] for run in line.runs)
        row["seconds"] = mean(seconds)
        row["peak_memory_gib"] = mean(list(map(_peak, line.runs)))
        table.append(row)
    return table


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if any value is missing, since a mean over fewer seeds would not be comparable."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _peak(run: Rows) -> float | None:
    """Peak memory of a run in GiB: the maximum over its rows, since a resumed run counts from zero again."""
    return max((row["peak_memory_gib"] for row in run if row.get("peak_memory_gib") is not None), default=None)


def _sd(values: Sequence[float]) -> float | None:
    """The unbiased standard deviation; None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table; all have the columns of the first one."""
    names = list(table[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in table)])


def _cell(value: Any) -> str:
    """A value of a table as text: "" for None, numbers with four significant digits."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the rows as CSV; a row may lack columns of others."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def curve_rows(lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Every number of metrics.jsonl, one row for each method, seed and epoch."""
    for line in lines:
        for seed, run in enumerate(line.runs):
            for row in run:
                numbers = {key: value for key, value in row.items() if isinstance(value, int | float) or value is None}
                yield {"method": line.name, "seed": seed, **numbers}


# -- figures ------------------------------------------------------------------------------------------------------


def draw(lines: Sequence[Line], folder: Path, fronts: Sequence[Line] = ()) -> list[Path]:
    """Draw each figure as PNG and SVG into `folder`; returns the PNG files.

    Args:
        fronts: runs with the first seed and other settings, by method; no figure of them if empty.
    """
    import matplotlib

    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot

    kinds: dict[str, Callable[[Any], None]] = {
        "reward_by_trajectories": lambda axis: _curves(axis, lines, "trajectories", 0, "trajectories"),
        # An epoch's trajectories are sampled before its updates: its reward belongs to the updates made so far.
        "reward_by_updates": lambda axis: _curves(axis, lines, "optimizer_step", 1, "optimizer updates before"),
        "reward_by_seconds": lambda axis: _curves(axis, lines, "seconds", 1, "seconds of training before"),
        "reward_against_diversity": lambda axis: _trade_off(axis, lines, "diversity", "diversity within a prompt"),
        "reward_against_noun_top1": lambda axis: _trade_off(axis, lines, "noun_top1", "noun_top1"),
        "fronts_diversity": lambda axis: _fronts(axis, fronts, "diversity", "diversity within a prompt"),
        "fronts_noun_top1": lambda axis: _fronts(axis, fronts, "noun_top1", "noun_top1"),
        "time_and_memory": lambda axis: _costs(axis, lines),
    }
    # The lines go through all colours with one dash pattern, then through all colours with the next.
    looks = cycler(linestyle=["-", "--", ":"]) * matplotlib.rcParams["axes.prop_cycle"]
    files = []
    for name, plot in kinds.items():
        figure, axis = pyplot.subplots(figsize=(6.4, 4.2))
        axis.set_prop_cycle(looks)
        plot(axis)
        if axis.has_data():
            figure.tight_layout()
            files.append(folder / f"{name}.png")
            for path in (files[-1], folder / f"{name}.svg"):
                figure.savefig(path, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    return files


def _curves(axis: Any, lines: Sequence[Line], key: str, late: int, label: str) -> None:
    """Draw the mean reward over seeds, and one standard deviation, against `key`.

    Args:
        key:  of metrics.jsonl, or `seconds`, those of training so far, as means over the seeds.
        late: the reward of epoch i is drawn at the value that `key` had at the end of epoch i - late.
    """
    for line in lines:
        epochs = min(len(trained(run)) for run in line.runs)
        runs = [trained(run)[:epochs] for run in line.runs]
        so_far = np.mean([_seconds(run) if key == "seconds" else [row[key] for row in run] for run in runs], axis=0)
        x = [0] * late + so_far[: epochs - late].tolist()
        y = np.array([[row["reward_mean"] for row in run] for run in runs])
        (drawn,) = axis.plot(x, y.mean(0), label=f"{line.name} ({len(runs)} seed{'s' * (len(runs) > 1)})")
        if len(runs) > 1:
            spread = y.std(0, ddof=1)
            axis.fill_between(x, y.mean(0) - spread, y.mean(0) + spread, alpha=0.15, color=drawn.get_color())
    axis.set(xlabel=label, ylabel="reward of the rollouts, mean and sd over seeds")
    _legend(axis)


def _seconds(run: Rows) -> list[float]:
    """Seconds of sampling, scoring and updates up to the end of each epoch."""
    phases = ("seconds_sample", "seconds_reward", "seconds_update")
    return np.cumsum([sum(row.get(phase) or 0.0 for phase in phases) for row in run]).tolist()


def _fronts(axis: Any, fronts: Sequence[Line], key: str, label: str) -> None:
    """Draw the final evaluation of every setting that a method tried, joined in the order of `key`."""
    for line in fronts:
        finals = [evaluated(run)[-1] for run in line.runs]
        points = sorted((row[key], row["eval_reward_mean"]) for row in finals if row.get(key) is not None)
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=line.name)
    axis.set(xlabel=label, ylabel="reward of the fixed evaluation, first seed")
    if axis.lines:
        _legend(axis)


def _trade_off(axis: Any, lines: Sequence[Line], key: str, label: str) -> None:
    """Draw the reward against `key` for the fixed evaluations of all epochs: a dot for each seed, a line for their mean."""
    for line in lines:
        runs = [[row for row in evaluated(run) if row.get(key) is not None] for run in line.runs]
        if not all(runs):
            continue
        points = np.array([[(row[key], row["eval_reward_mean"]) for row in run[: min(map(len, runs))]] for run in runs])
        mean = points.mean(0)
        (drawn,) = axis.plot(mean[:, 0], mean[:, 1], marker="o", markersize=4, label=line.name)
        axis.scatter(points[..., 0], points[..., 1], s=6, alpha=0.35, color=drawn.get_color())
    axis.set(xlabel=label, ylabel="reward of the fixed evaluation")
    if axis.lines:
        _legend(axis)


def _legend(axis: Any) -> None:
    """Add a legend: beside the axes if it is so long that it would cover the curves."""
    is_long = len(axis.get_legend_handles_labels()[0]) > _MOST_INSIDE
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if is_long else {}
    axis.legend(fontsize=8, **place)


def _costs(axis: Any, lines: Sequence[Line]) -> None:
    """Draw seconds per trajectory by phase as stacked bars; the labels also have the peak memory."""
    phases = ("sample", "reward", "update")
    names = []
    for line in lines:
        rows = [row for run in line.runs for row in trained(run)]
        memory = mean(list(map(_peak, line.runs)))
        names.append(line.name if memory is None else f"{line.name}\n{memory:.2f} GiB")
        count = sum(trained(run)[-1]["trajectories"] for run in line.runs)
        left = 0.0
        for index, phase in enumerate(phases):
            seconds = sum(row.get(f"seconds_{phase}") or 0.0 for row in rows) / count
            label = phase if line is lines[0] else None
            axis.barh(len(names) - 1, seconds, left=left, color=f"C{index}", label=label)
            left += seconds
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="seconds a trajectory")
    axis.legend(fontsize=8)


# -- page ---------------------------------------------------------------------------------------------------------

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ccc;padding:3px 7px;text-align:right}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}figcaption{color:#555;font-size:13px}"
    "figure{display:inline-block;width:48%;margin:1em 1% 0 0;vertical-align:top}figure:last-child{width:100%}"
)


def page(
    title: str, text: str, tables: dict[str, Sequence[dict[str, Any]]], pictures: Sequence[Path], path: Path
) -> None:
    """Write one HTML file that holds the text, the tables and the pictures themselves."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(text)}</p>"]
    for caption, table in tables.items():
        parts += [f"<h2>{html.escape(caption)}</h2>", _html_table(table)]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        name = html.escape(picture.stem.replace("_", " "))
        parts.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
        )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = f"<body>{''.join(parts)}</body>"
    path.write_text(f'<!doctype html><html lang="en">{head}{body}</html>\n', encoding="utf-8")


def _html_table(table: Sequence[dict[str, Any]]) -> str:
    """An HTML table; transposed where it would have many columns and few rows."""
    if not table:
        return "<p>nothing</p>"
    lines = [list(table[0]), *([_cell(value) for value in row.values()] for row in table)]
    if len(lines[0]) > 2 * len(lines):
        lines = [list(column) for column in zip(*lines, strict=True)]
    tags = ["th", *["td"] * (len(lines) - 1)]
    rows = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) for tag, line in zip(tags, lines, strict=True)
    )
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
