"""Training beside searching at equal cost: what a picture costs if a run's training is spread over the pictures drawn later."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dag.evaluation.measure import BASE, BASE_AGAIN, Row

# Pictures over which the figure spreads a training.
_PICTURES = (100, 1_000, 10_000)


def break_even(models: Sequence[Row]) -> Iterator[str]:
    """For each run and search in words: from which picture on training takes fewer passes than searching."""
    runs = [row for row in models if row["training_passes"] is not None]
    for run in runs:
        for search in _searches(models):
            saved = search["passes"] - run["passes"]
            if saved > 0:
                count = run["training_passes"] / saved
                yield f"{run['model']} takes fewer passes than {search['model']} from the {_ordinal(int(count) + 1)} picture on"


def _searches(models: Sequence[Row]) -> list[Row]:
    return [row for row in models if row["training_passes"] is None and row["model"] not in (BASE, BASE_AGAIN)]


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number:,}" + ("th" if number % 100 in (11, 12, 13) else endings.get(number % 10, "th"))


def draw(models: Sequence[Row], path: Path) -> None:
    """Draw the first reward against the passes of a picture as a PNG: a dot for a search, a line for a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    reward = next(iter(models[0]["rewards"]))
    figure, axis = pyplot.subplots(figsize=(6.4, 4.2))
    for row in models:
        passes, mean = row["passes"], row["rewards"][reward]["mean"]
        if row["training_passes"] is None:
            if row["model"] != BASE_AGAIN:
                axis.plot(passes, mean, "o", label=row["model"])
            continue
        spread = [passes + row["training_passes"] / count for count in _PICTURES]
        (line,) = axis.plot(
            spread, [mean] * len(spread), "--|", label=f"{row['model']}, training spread over so many pictures"
        )
        for x, count in zip(spread, _PICTURES, strict=True):
            axis.annotate(
                f"{count:,}", (x, mean), (0, 5), textcoords="offset points", fontsize=7, color=line.get_color()
            )
    axis.set(xscale="log", xlabel="guided forward passes of the denoiser a picture", ylabel=reward)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
