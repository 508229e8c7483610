"""Scenes: what is in a picture, drawn at random by the rules, and the picture itself."""

import functools
import io
import random
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from clips_core.errors import InputError
from clips_core.world.settings import COLOURS, PICTOGRAMS, RGB, TINTS, Pair, Rules

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom exclusive
HeldOut = Literal["never", "natural", "always"]
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
WORD_HEIGHT = 0.25  # of the picture's side: the plate with the printed word


class Thing(NamedTuple):
    """One object of a scene."""

    name: str
    colour: str
    box: Box

    @property
    def pair(self) -> Pair:
        return self.colour, self.name

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class Background(NamedTuple):
    pattern: str
    tint: str


@dataclass(frozen=True)
class Scene:
    """Everything that there is to know of a picture. (Only what a caption writer believes to see can lack a background.)"""

    size: int  # pixels, square
    things: tuple[Thing, ...]  # no two of the same colour and name; boxes do not meet
    background: Background | None
    word: str | None = None  # printed on a white plate
    word_box: Box | None = None

    @property
    def pairs(self) -> set[Pair]:
        return {thing.pair for thing in self.things}

    @property
    def names(self) -> list[str]:
        return [thing.name for thing in self.things]

    def zone(self, thing: Thing) -> tuple[str, str]:
        """Where an object is: one of left, center, right and one of top, middle, bottom."""
        x, y = (coordinate / self.size for coordinate in thing.centre)
        column = "left" if x < 0.42 else "right" if x > 0.58 else "center"
        row = "top" if y < 0.42 else "bottom" if y > 0.58 else "middle"
        return column, row

    def to_json(self) -> dict[str, Any]:
        """The scene as plain values, its relations written out."""
        return {
            "size": self.size,
            "objects": [{"name": t.name, "colour": t.colour, "box": list(t.box)} for t in self.things],
            "background": self.background._asdict() if self.background else None,
            "word": self.word,
            "word_box": list(self.word_box) if self.word_box else None,
            "relations": [
                {"subject": i, "relation": found, "object": j}
                for (i, a), (j, b) in combinations(enumerate(self.things), 2)
                if (found := relation(a, b)) is not None
            ],
        }


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def relation(a: Thing, b: Thing) -> str | None:
    """How `a` lies to `b`, or None if it is neither clearly beside nor clearly above or below."""
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    if abs(dx) >= 1.25 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= 1.25 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


# ---------------------------------------------------------------------------------------------------- drawing lots


def draw_scene(rng: random.Random, rules: Rules, objects: HeldOut | list[Pair]) -> Scene:
    """A random scene.

    Args:
        rng: the picture's own generator.
        rules: what may occur.
        objects: the colours and names of its objects; or how they are drawn: so that the held-out colour–object pairs occur
            `never` (training), as often as all others (`natural`), or at least once (`always`).
    """
    size = rules.config.image_size
    background = Background(rng.choice(rules.patterns), rng.choice(rules.tints))
    word = rng.choice(rules.words) if rng.random() < rules.config.word_rate else None
    word_box = _place_word(rng, word, size) if word else None
    pairs = objects if isinstance(objects, list) else _draw_pairs(rng, rules, objects)
    boxes = _place(rng, [name for _, name in pairs], rules, [word_box] if word_box else [])
    things = tuple(Thing(name, colour, box) for (colour, name), box in zip(pairs, boxes, strict=True))
    return Scene(size, things, background, word, word_box)


def draw_name(rng: random.Random, rules: Rules, present: list[str]) -> str:
    """One more object for a picture that shows `present`: of the first one's theme at the companion rate."""
    companions = [name for name in rules.theme[present[0]] if name not in present] if present else []
    absent = [name for name in rules.pictograms if name not in present]
    pool = companions if companions and rng.random() < rules.config.companion_rate else absent
    return rng.choices(pool, [rules.weight(name) for name in pool])[0]


def _draw_pairs(rng: random.Random, rules: Rules, held_out: HeldOut) -> list[Pair]:
    count = rng.randint(rules.level.min_objects, rules.level.max_objects)
    pairs = [rng.choice(sorted(rules.held_out))] if held_out == "always" else []
    while len(pairs) < count:
        present = [name for _, name in pairs]
        repeat = bool(present) and rng.random() < rules.config.repeat_rate
        name = rng.choice(present) if repeat else draw_name(rng, rules, present)
        colours = [c for c in rules.colours_of(name, training=held_out == "never") if (c, name) not in pairs]
        if len(colours) > repeat:  # at least one colour stays wrong for this name: questions need it
            pairs.append((rng.choice(colours), name))
    rng.shuffle(pairs)
    return pairs


def _place(rng: random.Random, names: list[str], rules: Rules, taken: list[Box]) -> list[Box]:
    """Boxes that meet neither each other nor those in `taken`; the objects shrink towards the least size until they fit."""
    size, level = rules.config.image_size, rules.level
    for attempt in range(200):
        largest = max(level.min_size, level.max_size - (level.max_size - level.min_size) * attempt / 20)
        boxes: list[Box] = []
        for name in names:
            side = round(size * rng.uniform(level.min_size, largest))
            width, height = glyph(name, side).shape[::-1]
            for _ in range(12):
                x, y = _start(rng, width, size, level.grid), _start(rng, height, size, level.grid)
                box = (x, y, x + width, y + height)
                if min(box) >= 1 and max(box) < size and not any(_meet(box, other) for other in (*taken, *boxes)):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(names):
            return boxes
    raise InputError(f"world config: {len(names)} objects do not fit into a picture; lower max_objects or change grid")


def _start(rng: random.Random, length: int, size: int, grid: int) -> int:
    """Where a box of `length` pixels begins, along one side of the picture: its centre on a line of the grid, or anywhere."""
    if not grid:
        return rng.randint(1, size - length - 1)
    return round(size * rng.randint(1, grid - 1) / grid - length / 2)


def _meet(a: Box, b: Box) -> bool:
    """Whether two boxes overlap or touch (one pixel of background is kept between them)."""
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _place_word(rng: random.Random, word: str, size: int) -> Box:
    width, height = word_plate(word, size).size
    x = rng.randint(0, size - width)
    y = rng.choice((0, size - height))
    return x, y, x + width, y + height


# ---------------------------------------------------------------------------------------------------- rendering


def render(scene: Scene, rng: random.Random, clutter: int = 0) -> Image.Image:
    """The picture of a scene, RGB [size, size]; shades vary a little from picture to picture."""
    assert scene.background is not None
    image = Image.fromarray(_background(scene.background, scene.size, rng))
    canvas = ImageDraw.Draw(image)
    for _ in range(clutter):
        x, y = rng.randrange(scene.size), rng.randrange(scene.size)
        reach = scene.size // 10
        ink = tuple(int(c * 0.72) for c in _shade(TINTS[scene.background.tint], rng))
        canvas.line((x, y, x + rng.randint(-reach, reach), y + rng.randint(-reach, reach)), fill=ink)
    for thing in scene.things:
        _paint(image, thing, _shade(COLOURS[thing.colour], rng))
    if scene.word and scene.word_box:
        image.paste(word_plate(scene.word, scene.size), scene.word_box[:2])
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _shade(colour: RGB, rng: random.Random) -> RGB:
    """A little darker or lighter; the hue stays."""
    offset = rng.randint(-10, 10)
    red, green, blue = (min(255, max(0, c + offset)) for c in colour)
    return red, green, blue


def _background(background: Background, size: int, rng: random.Random) -> np.ndarray:
    """uint8 [size, size, 3]: the tint, darkened where the pattern is."""
    y, x = np.mgrid[:size, :size] + rng.randrange(size)
    width = rng.uniform(0.07, 0.11) * size  # of a stripe, a check, a ring
    depth = 0.24
    pattern: np.ndarray
    match background.pattern:
        case "plain":
            pattern = np.zeros((size, size))
        case "striped":
            along = rng.choice((x, y, (x + y) / 2**0.5, (x - y) / 2**0.5))
            pattern = np.floor(along / width) % 2
        case "checkered":
            pattern = (np.floor(x / width) + np.floor(y / width)) % 2
        case "shaded":
            ramp = np.linspace(0, 1, size) if rng.random() < 0.5 else np.linspace(1, 0, size)
            pattern = np.broadcast_to(ramp if rng.random() < 0.5 else ramp[:, None], (size, size))
            depth = 0.32
        case "speckled":
            noise = np.frombuffer(rng.randbytes(size * size), np.uint8).reshape(size, size)
            pattern = noise < 36
            depth = 0.34
        case _:  # ringed
            cx, cy = rng.uniform(x.min(), x.max()), rng.uniform(y.min(), y.max())
            pattern = np.floor(np.hypot(x - cx, y - cy) / width) % 2
    tint = np.array(_shade(TINTS[background.tint], rng))
    return (tint * (1 - depth * pattern[..., None])).astype(np.uint8)


def _paint(image: Image.Image, thing: Thing, colour: RGB) -> None:
    left, top, right, bottom = thing.box
    side = max(right - left, bottom - top)
    lines = Image.fromarray(glyph(thing.name, side))
    if not PICTOGRAMS[thing.name].outline:
        image.paste(colour, (left, top), lines)
        return
    image.paste(colour, (left, top), Image.fromarray(glyph(thing.name, side, inside=True)))
    light = sum(colour) > 150
    red, green, blue = (int(c * 0.55) if light else (c + 3 * 150) // 4 for c in colour)
    image.paste((red, green, blue), (left, top), lines)


@functools.cache
def glyph(name: str, side: int, *, inside: bool = False) -> np.ndarray:
    """Coverage of a pictogram, uint8 [h, w] with max(h, w) = side; with `inside`, what its lines enclose is covered too."""
    mask = _silhouette(name) if inside else _large_glyph(name)
    scale = side / max(mask.size)
    size = (max(1, round(mask.width * scale)), max(1, round(mask.height * scale)))
    return np.array(mask.resize(size, Image.Resampling.LANCZOS))


@functools.cache
def _large_glyph(name: str) -> Image.Image:
    pictogram = PICTOGRAMS[name]
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", 160)
    mask = Image.new("L", (400, 400))
    canvas = ImageDraw.Draw(mask)
    canvas.text((200, 200), pictogram.glyph, font=font, fill=255, anchor="mm", stroke_width=pictogram.stroke)
    return mask.crop(mask.getbbox())


@functools.cache
def _silhouette(name: str) -> Image.Image:
    """All that cannot be reached from outside without crossing a line of the pictogram."""
    mask = ImageOps.expand(_large_glyph(name), 1).point(lambda value: 255 if value > 127 else 0)
    ImageDraw.floodfill(mask, (0, 0), 128)
    return ImageOps.crop(mask.point(lambda value: 0 if value == 128 else 255), 1)


@functools.cache
def word_plate(word: str, size: int) -> Image.Image:
    """A white plate with a word in black capitals, for a picture of `size` pixels; RGB."""
    height = round(WORD_HEIGHT * size)
    font = ImageFont.truetype(FONTS / "DejaVuSans-Bold.ttf", round(0.9 * height))
    left, top, right, bottom = (int(edge) for edge in font.getbbox(word.upper()))
    margin = max(1, height // 6)
    plate = Image.new("RGB", (right - left + 2 * margin, bottom - top + 2 * margin), "white")
    ImageDraw.Draw(plate).text((margin - left, margin - top), word.upper(), font=font, fill="black")
    return plate
