"""Scenes as training targets: class indices for classifiers, and which caption is true of which picture."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from dag.assets.build.scenes import STYLES, TEXTURES, Scene
from dag.evaluation.judge import COLOURS, NOUNS, SHAPES

NAMES = (*NOUNS, *SHAPES)
_IGNORE = -100


@dataclass(frozen=True)
class Targets:
    """Class indices for N scenes; -100, which cross_entropy ignores, where a question makes no sense for a scene."""

    names: Tensor
    """(N, 69) float32, multi-hot over NAMES."""
    colour: Tensor
    """(N,) int64, index in COLOURS; for scenes of one kind of shape."""
    background: Tensor
    """(N,) int64, index in COLOURS."""
    count: Tensor
    """(N,) int64, number of things - 1; for scenes of one kind of thing."""


def targets(scenes: list[Scene]) -> Targets:
    """The classification targets of scenes."""
    names = torch.zeros(len(scenes), len(NAMES))
    colour, background, count = (torch.full((len(scenes),), _IGNORE) for _ in range(3))
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            names[row, NAMES.index(thing.name)] = 1
        background[row] = COLOURS.index(scene.background)
        if len(scene.things) == 1:
            count[row] = scene.count - 1
            if scene.things[0].colour is not None:
                colour[row] = COLOURS.index(scene.things[0].colour)
    return Targets(names, colour, background, count)


def caption_matches(scenes: list[Scene]) -> Tensor:
    """A table (N, N) bool: whether the caption of scene j (column) is true of the picture of scene i (row).

    "a cat" is also true of a glossy cat on blue. Without this, contrastive training would count such pairs as wrong.
    """
    stated = [_stated(scene) for scene in scenes]
    facts = [_facts(scene) for scene in scenes]
    vocabulary = {fact: index for index, fact in enumerate(sorted(set().union(*stated, *facts)))}
    has, says = torch.zeros(len(scenes), len(vocabulary)), torch.zeros(len(scenes), len(vocabulary))
    for row in range(len(scenes)):
        has[row, [vocabulary[fact] for fact in facts[row]]] = 1
        says[row, [vocabulary[fact] for fact in stated[row]]] = 1
    return has @ says.T == says.sum(1)


def _facts(scene: Scene) -> set[str]:
    """Everything that a caption may say about a picture."""
    subject = _subject(scene)
    facts = {f"background {scene.background}", f"texture {scene.texture}", f"what {subject}"}
    return facts | {f"style {thing.style}" for thing in scene.things if len(scene.things) == 1}


def _stated(scene: Scene) -> set[str]:
    """What the scene's caption says: a subset of the facts."""
    said, _, backdrop = scene.caption.partition(" on ")
    words = re.findall(r"[a-z]+", backdrop)
    stated = {f"what {_subject(scene)}"}
    stated |= {f"background {word}" for word in words if word in COLOURS}
    stated |= {f"texture {word}" for word in words if word in TEXTURES}
    return stated | {f"style {word}" for word in said.split() if word in STYLES and len(scene.things) == 1}


def _subject(scene: Scene) -> str:
    """The part of a caption that is in every caption of the scene: what is shown, without style and background."""
    said = scene.caption.partition(" on ")[0]
    return " ".join(word for word in said.split() if word not in (*STYLES, "a", "an"))
