"""The named prompt sets. Some are shipped; the others are read from a copy that the user has downloaded."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dag.errors import UsageError

ASSETS = Path(__file__).parents[1] / "assets" / "prompts"

# The 45 common animals that DDPO (Black et al. 2024, appendix) and DAG train on.
SIMPLE_ANIMALS = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat",
    "lion", "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark",
    "whale", "dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose",
    "bee", "pig", "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo",
)  # fmt: skip


@dataclass(frozen=True)
class PromptSet:
    """Prompts to train on, and prompts kept back for the evaluation."""

    training: tuple[str, ...]
    held_out: tuple[str, ...] = ()


def with_article(noun: str) -> str:
    """'cat' -> 'a cat', 'ant' -> 'an ant'."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def simple_animals() -> PromptSet:
    return PromptSet(tuple(map(with_article, SIMPLE_ANIMALS)))


def imagenet(first: int = 0, last: int = 1000) -> PromptSet:
    """The ImageNet classes first <= i < last, in the order of ILSVRC 2012."""
    names = (ASSETS / "imagenet.txt").read_text(encoding="utf-8").split("\n")
    return PromptSet(tuple(map(with_article, names[first:last])))


# -- DrawBench ----------------------------------------------------------------------------------------------------

_DRAWBENCH_SOURCE = "the Imagen authors' table (https://imagen.research.google, 'DrawBench'), saved as CSV"
# Zhang et al. leave these out: prompts that are misspelt or rare on purpose.
_DRAWBENCH_DROPPED = ("Misspellings", "Rare Words")
_DRAWBENCH_HELD_OUT = 2


def drawbench(path: Path) -> PromptSet:
    """DrawBench (Saharia et al. 2022) as Zhang et al. split it: two prompts of each category are held out.

    They do not say which two; here it is the last two of each category in the file's order. The categories in
    _DRAWBENCH_DROPPED are left out, whether or not the file has them.

    Args:
        path: a CSV file with the columns Prompts and Category.

    Raises:
        UsageError: the file is missing, or is not such a file.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [(row["Prompts"].strip(), row["Category"].strip()) for row in csv.DictReader(file)]
    except (KeyError, AttributeError, csv.Error):
        raise UsageError(
            f"prompts.path: {path} has no columns Prompts and Category; give {_DRAWBENCH_SOURCE}"
        ) from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, _DRAWBENCH_SOURCE) from None
    by_category: dict[str, list[str]] = {}
    for prompt, category in rows:
        if prompt and category not in _DRAWBENCH_DROPPED:
            by_category.setdefault(category, []).append(prompt)
    return _hold_out(list(by_category.values()), _DRAWBENCH_HELD_OUT, path, _DRAWBENCH_SOURCE)


# -- HPDv2 --------------------------------------------------------------------------------------------------------

_HPDV2_SOURCE = (
    "the benchmark prompts of HPDv2 (https://huggingface.co/datasets/ymhao/HPDv2, folder benchmark: anime.json, "
    "concept-art.json, paintings.json, photo.json)"
)
HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
_HPDV2_HELD_OUT = 10


def hpdv2(path: Path, style: str | None) -> PromptSet:
    """Prompts of HPDv2 (Wu et al. 2023), the last ten of each style held out.

    Args:
        path:  a folder with one JSON list of prompts for each style, or one such file.
        style: one of HPDV2_STYLES; None takes all.

    Raises:
        UsageError: a file is missing, or is not a JSON list of prompts.
    """
    styles = [style] if style else HPDV2_STYLES
    files = [path / f"{name}.json" for name in styles] if path.is_dir() else [path]
    return _hold_out([_json_list(file) for file in files], _HPDV2_HELD_OUT, path, _HPDV2_SOURCE)


def _json_list(path: Path) -> list[str]:
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, _HPDV2_SOURCE) from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise UsageError(f"prompts.path: {path} is not a JSON list of prompts; give {_HPDV2_SOURCE}")
    return prompts


# -- all ----------------------------------------------------------------------------------------------------------

SHIPPED: dict[str, Callable[[], PromptSet]] = {
    "simple_animals": simple_animals,
    "imagenet": imagenet,
    "imagenet_animals": lambda: imagenet(0, 398),
    "imagenet_dogs": lambda: imagenet(151, 269),
}
DOWNLOADED = {"drawbench": _DRAWBENCH_SOURCE, "hpdv2": _HPDV2_SOURCE}


def named(name: str, path: str | None, style: str | None) -> PromptSet:
    """A set by its name in recipes. Raises UsageError if it is not shipped and `path` is missing or wrong."""
    if name in SHIPPED:
        return SHIPPED[name]()
    if path is None:
        raise UsageError(f"prompts.path: {name} is not shipped; download {DOWNLOADED[name]} and give its path")
    place = Path(path).expanduser()
    return drawbench(place) if name == "drawbench" else hpdv2(place, style)


def _hold_out(groups: list[list[str]], count: int, path: Path, source: str) -> PromptSet:
    """The prompts of all groups, the last `count` of each group held out. Raises UsageError if none is left to train on."""
    training = tuple(prompt for group in groups for prompt in group[:-count])
    held_out = tuple(prompt for group in groups for prompt in group[-count:])
    if not training:
        raise UsageError(f"prompts.path: {path} holds no prompts to train on; give {source}")
    return PromptSet(training, held_out)


def _unreadable(path: Path, error: Exception, source: str) -> UsageError:
    return UsageError(f"prompts.path: cannot read {path}: {getattr(error, 'strerror', None) or error}; give {source}")
