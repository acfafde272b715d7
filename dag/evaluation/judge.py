"""Does a picture of the embedded model show what its prompt asked for?

The judge, a small classifier that no reward uses, recognises what a picture shows. This module owns the judge network and the
closed vocabulary of the embedded model's captions; `dag.assets.build` trains both models with this vocabulary.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dag.errors import RunError
from dag.recipe.prompt_sets import SIMPLE_ANIMALS

JUDGE = Path(__file__).parents[1] / "assets" / "judge"
_THINGS = (
    "apple",
    "banana",
    "strawberry",
    "carrot",
    "pizza",
    "burger",
    "cake",
    "car",
    "bus",
    "rocket",
    "house",
    "tree",
    "sunflower",
    "rose",
    "mushroom",
    "robot",
    "guitar",
    "clock",
    "umbrella",
)
NOUNS = (*SIMPLE_ANIMALS, *_THINGS)
SHAPES = ("circle", "square", "triangle", "heart", "star")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "gray")
COUNTS = {2: "two", 3: "three", 4: "four"}
_PLURALS = {
    "fish": "fish",
    "sheep": "sheep",
    "deer": "deer",
    "mouse": "mice",
    "goose": "geese",
    "wolf": "wolves",
    "fox": "foxes",
    "butterfly": "butterflies",
    "fly": "flies",
    "bus": "buses",
    "strawberry": "strawberries",
}


def plural(noun: str) -> str:
    """The plural of one of NOUNS or SHAPES."""
    return _PLURALS.get(noun, f"{noun}s")


_SINGULARS = {form: name for name in (*NOUNS, *SHAPES) for form in (name, plural(name))}
_NUMBERS = {word: count for count, word in COUNTS.items()}


@dataclass(frozen=True)
class Expected:
    """What a prompt asks for. Colour and background are None where the prompt does not say."""

    name: str
    """One of NOUNS or SHAPES."""
    colour: str | None
    count: int
    background: str | None


def expected(prompt: str) -> Expected | None:
    """The attributes of a prompt about one kind of thing, such as "three red hearts on a blue background".

    None if it names no known thing or more than one.
    """
    subject, _, backdrop = prompt.lower().partition(" on ")
    words = re.findall(r"[a-z]+", subject)
    names = [_SINGULARS[word] for word in words if word in _SINGULARS]
    if len(names) != 1:
        return None
    return Expected(
        name=names[0],
        colour=next((word for word in words if word in COLOURS), None),
        count=next((_NUMBERS[word] for word in words if word in _NUMBERS), 1),
        background=next((word for word in re.findall(r"[a-z]+", backdrop) if word in COLOURS), None),
    )


@dataclass(frozen=True)
class Verdict:
    """The judge's logits for B pictures."""

    name: Tensor
    """(B, 69) for NOUNS, then SHAPES."""
    colour: Tensor
    """(B, 10) for COLOURS, the colour of the thing; meaningful for shapes only."""
    background: Tensor
    """(B, 10) for COLOURS."""
    count: Tensor
    """(B, 4) for one, two, three and four things."""


def _block(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


class Judge(nn.Module):
    """A convolutional classifier of (B, 3, 64, 64) images in [0, 1]."""

    def __init__(self, channels: Sequence[int] = (24, 40, 72, 96)) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.blocks = nn.Sequential(*map(_block, (3, *channels[:-1]), channels))
        self.sizes = [len(NOUNS) + len(SHAPES), len(COLOURS), len(COLOURS), 4]
        self.head = nn.Linear(2 * channels[-1], sum(self.sizes))

    def forward(self, images: Tensor) -> Verdict:
        """The logits for images (B, 3, 64, 64) in [0, 1]."""
        features = self.blocks(images * 2 - 1)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)
        return Verdict(*self.head(pooled).split(self.sizes, dim=1))


def load_judge(folder: Path = JUDGE) -> Judge:
    """The shipped judge in float32, eval mode. Raises RunError if its files are missing."""
    try:
        judge = Judge(json.loads((folder / "config.json").read_text(encoding="utf-8"))["channels"])
        state = load_file(folder / "judge.safetensors")
    except OSError as error:
        raise RunError(f"evaluation.fidelity: cannot read the judge in {folder}: {error}") from None
    judge.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    )
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def noun_accuracy(judge: Judge, images: Tensor, prompts: Sequence[str]) -> tuple[float, float]:
    """noun_top1 and noun_top5: the shares of images in which the judge recognises the thing that the prompt names.

    Top-1 counts an image if that thing is the judge's best guess, top-5 if it is among its best five.

    Args:
        images:  (B, 3, 64, 64) float in [0, 1].
        prompts: (B,) the prompt of each image.

    Raises:
        ValueError: a prompt does not name exactly one thing the judge knows.
    """
    names = [*NOUNS, *SHAPES]
    wanted = [expected(prompt) for prompt in prompts]
    for prompt, want in zip(prompts, wanted, strict=True):
        if want is None:
            raise ValueError(f"the judge knows no single thing in the prompt {prompt!r}")
    target = torch.tensor([names.index(want.name) for want in wanted if want is not None])
    ranks = judge(images.float().cpu()).name.argsort(dim=1, descending=True)
    hits = ranks == target[:, None]
    return float(hits[:, :1].any(1).float().mean()), float(hits[:, :5].any(1).float().mean())
