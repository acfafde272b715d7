"""Draws captioned scenes of things and shapes on coloured backgrounds; the truth about each scene is known.

A scene shows one thing, several of the same thing, or a pair with a spatial relation. Captions leave out style, background and
texture at random, so that one caption fits many pictures. A scene is a function of its seed.
"""

import io
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dag.evaluation.judge import COLOURS, COUNTS, NOUNS, SHAPES, plural
from dag.recipe.prompt_sets import with_article

SIDE = 64
_SPRITE_SIDE = 96
STYLES = ("flat", "drawn", "glossy")
TEXTURES = ("plain", "striped", "dotted", "checkered", "noisy", "gradient")
_TEXTURE_WEIGHTS = (62, 8, 8, 8, 5, 9)
_RGB = {
    "red": (220, 40, 45),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (50, 165, 70),
    "blue": (45, 95, 220),
    "purple": (135, 65, 185),
    "pink": (245, 140, 185),
    "white": (248, 248, 248),
    "black": (25, 25, 28),
    "gray": (140, 142, 146),
}
# Names in emojibase of the nouns that have another name there.
_EMOJI_LABELS = {
    **{name: f"{name} face" for name in ("cat", "dog", "monkey", "rabbit", "cow", "tiger", "mouse", "pig")},
    **{
        "sheep": "ewe",
        "fish": "tropical fish",
        "whale": "spouting whale",
        "squirrel": "chipmunk",
        "bee": "honeybee",
    },
    **{"camel": "two-hump camel", "apple": "red apple", "burger": "hamburger", "cake": "birthday cake"},
    **{"car": "automobile", "tree": "deciduous tree", "clock": "alarm clock"},
}
_PLACES = {
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.27, 0.3), (0.73, 0.3), (0.5, 0.74)),
    4: ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
}
_RELATIONS = {
    "to the left of": ((0.27, 0.5), (0.73, 0.5)),
    "to the right of": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
    "and": ((0.27, 0.5), (0.73, 0.5)),
}


@dataclass(frozen=True)
class Thing:
    """What is drawn: a noun in a style, or a shape in a colour."""

    name: str
    colour: str | None
    style: str | None


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    things: tuple[Thing, ...]
    count: int
    background: str
    texture: str
    caption: str


def load_sprites(packages: Path, cache: Path) -> dict[tuple[str, str], Image.Image]:
    """{(noun, style): RGBA square}, rendered once from the npm packages in `packages` and kept in `cache`."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        named = {f"{noun}|{style}": sprite for (noun, style), sprite in _render(packages).items()}
        np.savez_compressed(cache, allow_pickle=False, **named)
    with np.load(cache) as stored:
        return {tuple(key.split("|")): Image.fromarray(stored[key]) for key in stored.files}


def _render(packages: Path) -> dict[tuple[str, str], np.ndarray]:
    labels = json.loads((packages / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    codes = {entry["label"]: entry["hexcode"].lower() for entry in labels}
    sprites = {}
    for noun in NOUNS:
        code = codes[_EMOJI_LABELS.get(noun, noun)]
        spellings = (code, code.replace("-fe0f", ""))
        for style, package in (("flat", "fluent-emoji-flat"), ("drawn", "noto")):
            picture = _vector_sprite(packages / "@iconify-json" / package, spellings)
            if picture is not None:
                sprites[noun, style] = _square(picture)
        files = [packages / "@lobehub/fluent-emoji-3d/assets" / f"{spelling}.webp" for spelling in spellings]
        for file in [file for file in files if file.exists()][:1]:
            sprites[noun, "glossy"] = _square(Image.open(file).convert("RGBA"))
    return sprites


def _vector_sprite(package: Path, spellings: tuple[str, ...]) -> Image.Image | None:
    import resvg_py

    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    characters = json.loads((package / "chars.json").read_text(encoding="utf-8"))
    name = next((characters[spelling] for spelling in spellings if spelling in characters), None)
    if name is None:
        return None
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{_SPRITE_SIDE}" height="{_SPRITE_SIDE}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=_SPRITE_SIDE, height=_SPRITE_SIDE))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _square(picture: Image.Image) -> np.ndarray:
    """The picture cropped to its content, padded to a square and resized to (96, 96, 4) uint8."""
    picture = picture.crop(picture.getbbox())
    side = max(picture.size)
    padded = Image.new("RGBA", (side, side))
    padded.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.array(padded.resize((_SPRITE_SIDE, _SPRITE_SIDE), Image.Resampling.LANCZOS))


def _shape_sprite(shape: str, rgb: tuple[int, ...]) -> Image.Image:
    side = 128
    picture = Image.new("RGBA", (side, side))
    draw, fill = ImageDraw.Draw(picture), (*rgb, 255)
    if shape == "circle":
        draw.ellipse((2, 2, side - 3, side - 3), fill=fill)
    elif shape == "square":
        draw.rectangle((8, 8, side - 9, side - 9), fill=fill)
    elif shape == "triangle":
        draw.polygon([(side / 2, 6), (side - 4, side - 12), (4, side - 12)], fill=fill)
    elif shape == "star":
        radii = [(side / 2 - 2) * (1 if i % 2 == 0 else 0.42) for i in range(10)]
        angles = [i * math.pi / 5 for i in range(10)]
        centre = side / 2
        draw.polygon(
            [(centre + r * math.sin(a), centre + 4 - r * math.cos(a)) for r, a in zip(radii, angles, strict=True)],
            fill=fill,
        )
    else:
        angle = np.linspace(0, 2 * np.pi, 80)
        x = 16 * np.sin(angle) ** 3
        y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
        draw.polygon(
            [(side / 2 + a * side / 34, side / 2 - 4 - b * side / 34) for a, b in zip(x, y, strict=True)],
            fill=fill,
        )
    return picture


def _background(rng: random.Random, texture: str, rgb: tuple[int, ...]) -> Image.Image:
    colour = np.array(rgb, np.float32)
    other = np.clip(colour * 0.62 if colour.mean() > 110 else colour + 85, 0, 255)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    if texture == "noisy":
        noise = np.random.default_rng(rng.randrange(1 << 30)).normal(0, 34, (SIDE, SIDE, 3))
        return Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8))
    mask = np.zeros((SIDE, SIDE), np.float32)
    if texture == "striped":
        period, along = rng.choice((8, 12, 16)), rng.choice((x, y, x + y))
        mask = (along // (period // 2)) % 2
    elif texture == "dotted":
        period = rng.choice((10, 12))
        mask = ((x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (period * 0.3) ** 2).astype(
            np.float32
        )
    elif texture == "checkered":
        period = rng.choice((6, 8, 12))
        mask = (x // period + y // period) % 2
    elif texture == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        ramp = x * math.cos(angle) + y * math.sin(angle)
        mask = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    return Image.fromarray((colour * (1 - mask[..., None]) + other * mask[..., None]).astype(np.uint8))


class SceneMaker:
    """Draws random scenes.

    Args:
        sprites: from `load_sprites`.
    """

    def __init__(self, sprites: dict[tuple[str, str], Image.Image]) -> None:
        self.sprites = sprites

    def __call__(self, seed: int) -> tuple[np.ndarray, Scene]:
        """The picture (64, 64, 3) uint8 and the scene of a seed."""
        rng = random.Random(seed)
        background, texture = rng.choice(COLOURS), rng.choices(TEXTURES, _TEXTURE_WEIGHTS)[0]
        picture = _background(rng, texture, self._jittered(rng, background, 10))
        kind = rng.choices(("one", "several", "pair"), (72, 20, 8))[0]
        first = self._thing(rng, background, 0.22 if kind == "one" else 0.45)
        things: tuple[Thing, ...] = (first,)
        count = 1
        if kind == "one":
            width = SIDE * rng.uniform(0.66, 0.92)
            slack = (SIDE - width) / 2 * 0.9
            centre = (SIDE / 2 + rng.uniform(-slack, slack), SIDE / 2 + rng.uniform(-slack, slack))
            self._paste(rng, picture, first, centre, width)
            words = self.describe(rng, first)
        elif kind == "several":
            count = rng.randint(2, 4)
            width = SIDE * rng.uniform(0.36, 0.44)
            for place in _PLACES[count]:
                self._paste(rng, picture, first, self._near(rng, place), width)
            words = self.describe(rng, first, count)
        else:
            second = self._thing(rng, background, 0.0 if first.colour is None else 1.0)
            things, width = (first, second), SIDE * rng.uniform(0.38, 0.47)
            relation = rng.choice(tuple(_RELATIONS))
            for thing, place in zip(things, _RELATIONS[relation], strict=True):
                self._paste(rng, picture, thing, self._near(rng, place), width)
            words = f"{self.describe(rng, first)} {relation} {self.describe(rng, second)}"
        caption = words + self.describe_background(rng, background, texture)
        return np.array(picture), Scene(things, count, background, texture, caption)

    def _thing(self, rng: random.Random, background: str, shape_share: float) -> Thing:
        if rng.random() < shape_share:
            return Thing(rng.choice(SHAPES), rng.choice([colour for colour in COLOURS if colour != background]), None)
        noun = rng.choice(NOUNS)
        return Thing(noun, None, rng.choice([style for style in STYLES if (noun, style) in self.sprites]))

    def _paste(
        self,
        rng: random.Random,
        picture: Image.Image,
        thing: Thing,
        centre: tuple[float, float],
        width: float,
    ) -> None:
        if thing.colour is None:
            assert thing.style is not None
            sprite = self.sprites[thing.name, thing.style]
        else:
            sprite = _shape_sprite(thing.name, self._jittered(rng, thing.colour, 12))
        side = int(width)
        sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
        picture.paste(sprite, (round(centre[0] - side / 2), round(centre[1] - side / 2)), sprite)

    @staticmethod
    def _jittered(rng: random.Random, colour: str, by: int) -> tuple[int, ...]:
        return tuple(min(255, max(0, value + rng.randint(-by, by))) for value in _RGB[colour])

    @staticmethod
    def _near(rng: random.Random, place: tuple[float, float]) -> tuple[float, float]:
        return (place[0] + rng.uniform(-0.03, 0.03)) * SIDE, (place[1] + rng.uniform(-0.03, 0.03)) * SIDE

    @staticmethod
    def describe(rng: random.Random, thing: Thing, count: int = 1) -> str:
        """The words for `count` of a thing."""
        adjective = thing.colour or (thing.style if rng.random() < 0.3 else None)
        noun = thing.name if count == 1 else plural(thing.name)
        words = f"{adjective} {noun}" if adjective else noun
        return with_article(words) if count == 1 else f"{COUNTS[count]} {words}"

    @staticmethod
    def describe_background(rng: random.Random, background: str, texture: str) -> str:
        """The words for a background, parts of which are left out at random; possibly none."""
        words = []
        if rng.random() < (0.2 if texture == "plain" else 0.5):
            words.append(texture)
        if rng.random() < 0.5:
            words.append(background)
        return f" on {with_article(' '.join(words))} background" if words else ""
