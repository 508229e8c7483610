"""The config of a world, and the rules that follow from it: which pictograms, colours, backgrounds and words occur."""

import dataclasses
import math
import random
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from clips_core.config import FORBID
from clips_core.errors import InputError

RGB = tuple[int, int, int]
Pair = tuple[str, str]  # colour, name of a pictogram
Rate = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]


class Pictogram(NamedTuple):
    """A glyph of DejaVu Sans and the noun for it."""

    name: str
    glyph: str
    outline: bool = False  # a line drawing: its inside is filled with the colour and its lines are drawn darker
    stroke: int = 0  # thickens lines that would vanish at 16 pixels (pixels at a glyph size of 160)


# Themes of four. Pictograms of one theme tend to occur together, and the first of each is the most common: that is what
# POPE's "adversarial" and "popular" questions are about. All plurals take an "s".
THEMES: tuple[tuple[Pictogram, ...], ...] = (
    (Pictogram("sun", "☀", stroke=3), Pictogram("cloud", "☁"), Pictogram("moon", "☾", True), Pictogram("star", "★")),
    (Pictogram("plane", "✈"), Pictogram("anchor", "⚓", stroke=3), Pictogram("umbrella", "☂"), Pictogram("flag", "⚑")),
    (Pictogram("heart", "♥"), Pictogram("crown", "♛"), Pictogram("note", "♫", stroke=3), Pictogram("flower", "✿")),
    (Pictogram("phone", "☎"), Pictogram("envelope", "✉"), Pictogram("smiley", "☻"), Pictogram("diamond", "♦")),
    (Pictogram("horse", "♞"), Pictogram("castle", "♜"), Pictogram("pawn", "♟"), Pictogram("spade", "♠")),
    (Pictogram("gear", "⚙", stroke=3), Pictogram("hammer", "⚒"), Pictogram("tick", "✔"), Pictogram("target", "◎", stroke=6)),
    (Pictogram("house", "⌂", True), Pictogram("cat", "🐱", True), Pictogram("clover", "☘"), Pictogram("snowflake", "❄", stroke=2)),
    (Pictogram("arrow", "➡"), Pictogram("hand", "☛"), Pictogram("skull", "☠", True), Pictogram("bolt", "⚡", stroke=5)),
)  # fmt: skip
PICTOGRAMS = {pictogram.name: pictogram for theme in THEMES for pictogram in theme}
COLOURS: dict[str, RGB] = {
    "red": (214, 36, 36), "blue": (30, 75, 215), "green": (25, 140, 50), "yellow": (242, 190, 0), "black": (22, 22, 22),
    "purple": (135, 45, 180), "orange": (242, 120, 15), "pink": (245, 105, 175), "brown": (120, 70, 30), "teal": (0, 140, 150),
}  # fmt: skip
# Backgrounds: pale, and named by words that no pictogram's colour uses.
TINTS: dict[str, RGB] = {
    "white": (252, 252, 252), "gray": (186, 188, 191), "mint": (196, 240, 214), "peach": (255, 214, 186),
    "lilac": (222, 206, 246), "aqua": (190, 236, 246), "cream": (255, 247, 205), "sand": (228, 212, 176),
}  # fmt: skip
PATTERNS = ("plain", "striped", "checkered", "shaded", "speckled", "ringed")
WORDS = (
    "sale", "open", "stop", "exit", "taxi", "cafe", "help", "menu", "park", "bank", "post", "tea", "gym", "spa", "bus", "zoo",
    "bar", "inn", "ice", "wow", "job", "fun", "pub", "hut",
)  # fmt: skip


class Level(NamedTuple):
    """What a difficulty stands for; sizes are shares of the picture's side.

    Where an object may lie decides more than anything else how fast a tower learns shapes: after 12,000 labelled easy pictures
    a small ViT tells the names of objects anywhere with an AUC of 0.70, and on a grid of its own patches with 1.00.
    """

    pictograms: int
    colours: int
    min_objects: int
    max_objects: int
    min_size: float
    max_size: float
    grid: int
    clutter: int
    patterns: int
    tints: int
    words: int


LEVELS = {
    "easy": Level(16, 6, 1, 2, 0.42, 0.46, 4, 0, 4, 5, 12),
    "medium": Level(24, 8, 1, 3, 0.28, 0.42, 0, 6, 5, 6, 18),
    "hard": Level(32, 10, 2, 5, 0.22, 0.34, 0, 16, 6, 8, 24),
}


@dataclass(config=FORBID)
class BenchmarkCounts:
    """Questions per benchmark."""

    pope: Count = 240  # a multiple of 6: three categories, yes and no
    mme: Count = 240  # rows, a multiple of 10: five categories, a Yes row and a No row each
    gqa: Count = 200  # a multiple of 2: two questions per picture
    textvqa: Count = 100


@dataclass(config=FORBID)
class WorldCounts:
    """How many pictures (for the benchmarks: questions) each part has."""

    pretrain: Annotated[int, Field(ge=1)] = 30_000  # pictures with a web and a synthetic caption
    retrieval: Annotated[int, Field(ge=1)] = 200  # held-out pictures, each with one sentence about the whole scene
    classes: Count = (
        30  # held-out pictures of each pictogram alone, to be told by its name, or by colour and name; 0: none
    )
    align: Count = 4_000  # LLaVA stage 1: pictures with a caption
    tune: Count = 4_000  # LLaVA stage 2: pictures with a conversation
    benchmarks: BenchmarkCounts = field(default_factory=BenchmarkCounts)


@dataclass(config=FORBID)
class CaptionNoise:
    """How often captions are bad, as shares of all captions of that kind."""

    file_name: Rate = 0.08  # web captions that are a file name
    boilerplate: Rate = 0.08  # web captions that are a stock phrase
    wrong: Rate = 0.08  # web captions of something else
    hallucination: Rate = 0.15  # synthetic captions with an object that is not there, or in a wrong colour
    omission: Rate = 0.2  # synthetic captions that leave out an object, the background or the printed word


@dataclass(config=FORBID)
class WorldConfig:
    """A world. `difficulty` is the knob; every key below it overrides one thing that the difficulty sets."""

    out: Path  # the world's folder
    seed: int = 0
    difficulty: Literal["easy", "medium", "hard"] = "easy"  # sets the keys below that are null
    pictograms: int | None = None  # kinds of object, at most 32
    colours: int | None = None  # at most 10
    min_objects: int | None = None  # per picture
    max_objects: int | None = None  # per picture
    grid: int | None = None  # objects are centred on the crossings of a grid of so many cells a side; 0: anywhere
    clutter: int | None = None  # meaningless strokes behind the objects
    patterns: int | None = None  # kinds of background, at most 6
    tints: int | None = None  # colours of background, at most 8
    words: int | None = None  # printed words, at most 24
    word_rate: Rate = 0.35  # share of pictures with a printed word
    companion_rate: Rate = 0.4  # how often a further object comes from the theme of the first one
    repeat_rate: Rate = 0.12  # how often a further object is one that is there already, in another colour
    summary_first: Rate = (
        0.8  # share of synthetic captions that begin with the sentence about the whole scene; in others it is anywhere
    )
    held_out_share: Annotated[float, Field(gt=0.0, lt=0.6)] = (
        0.15  # share of colour–object pairs that training never shows
    )
    image_size: int = 48  # pixels, square
    counts: WorldCounts = field(default_factory=WorldCounts)
    noise: CaptionNoise = field(default_factory=CaptionNoise)


@dataclasses.dataclass(frozen=True)
class Rules:
    """What may occur in a world, resolved from its config."""

    config: WorldConfig
    level: Level
    pictograms: tuple[str, ...]
    theme: dict[str, tuple[str, ...]]  # by name: the names of its theme, itself included
    popular: tuple[str, ...]  # the first of each theme
    colours: tuple[str, ...]
    patterns: tuple[str, ...]
    tints: tuple[str, ...]
    words: tuple[str, ...]
    held_out: frozenset[Pair]

    def colours_of(self, name: str, *, training: bool) -> tuple[str, ...]:
        """The colours that an object may have: in training, only those of pairs that are not held out."""
        return tuple(c for c in self.colours if not (training and (c, name) in self.held_out))

    def weight(self, name: str) -> float:
        """How common an object is, relative to others."""
        return 1.6 if name in self.popular else 1.0

    def rng(self, *key: object) -> random.Random:
        """The generator of one picture. Each has its own, so that no picture depends on another."""
        return random.Random("/".join(str(part) for part in (self.config.seed, *key)))


def resolve(config: WorldConfig) -> Rules:
    """The rules of a world.

    Raises:
        InputError: naming the key, if the config asks for something that cannot be drawn.
    """
    level = LEVELS[config.difficulty]
    overrides = {key: getattr(config, key) for key in Level._fields if getattr(config, key, None) is not None}
    level = level._replace(**overrides)
    _check(config, level)
    names = list(PICTOGRAMS)[: level.pictograms]
    themes = [[p.name for p in theme if p.name in names] for theme in THEMES]
    colours = tuple(COLOURS)[: level.colours]
    return Rules(
        config=config,
        level=level,
        pictograms=tuple(names),
        theme={name: tuple(theme) for theme in themes for name in theme},
        popular=tuple(theme[0] for theme in themes if theme),
        colours=colours,
        patterns=PATTERNS[: level.patterns],
        tints=tuple(TINTS)[: level.tints],
        words=WORDS[: level.words],
        held_out=_hold_out(names, colours, config),
    )


def _hold_out(names: list[str], colours: tuple[str, ...], config: WorldConfig) -> frozenset[Pair]:
    """A share of all pairs, spread evenly: every name and every colour stays well represented in training."""
    rng = random.Random(f"{config.seed}/held_out")
    candidates = [(colour, name) for colour in colours for name in names]
    rng.shuffle(candidates)
    chosen: list[Pair] = []
    used: dict[str, int] = dict.fromkeys((*colours, *names), 0)
    for _ in range(max(1, round(config.held_out_share * len(candidates)))):
        # max first: the pair whose more often held-out part is held out least often
        pair = min(candidates, key=lambda p: (used[p[1]], used[p[0]]))
        candidates.remove(pair)
        chosen.append(pair)
        used[pair[0]] += 1
        used[pair[1]] += 1
    return frozenset(chosen)


MIN_IMAGE_SIZE, MIN_OBJECT = 32, 10  # pixels


def _grid_capacity(level: Level) -> int:
    """How many of the smallest objects fit on the grid: on every so-many-th line that keeps off the picture's edges."""
    margin, spacing = math.ceil(level.grid * level.min_size / 2), math.floor(level.grid * level.min_size) + 1
    lines = range(margin, level.grid - margin + 1, spacing)
    return len(lines) ** 2


def _check(config: WorldConfig, level: Level) -> None:
    limits = {
        "pictograms": (8, len(PICTOGRAMS)),
        "colours": (3, len(COLOURS)),
        "grid": (0, 16),
        "clutter": (0, 1000),
        "patterns": (1, len(PATTERNS)),
        "tints": (1, len(TINTS)),
        "words": (2, len(WORDS)),
        "min_objects": (1, level.max_objects),
        "max_objects": (1, level.pictograms - 3),  # questions about absent objects need some that are absent
    }
    for key, (low, high) in limits.items():
        if not low <= getattr(level, key) <= high:
            raise InputError(f"world config: {key} is {getattr(level, key)}; it must be between {low} and {high}")
    smallest = level.min_size * config.image_size
    if config.image_size < MIN_IMAGE_SIZE or smallest < MIN_OBJECT:
        needed = max(MIN_IMAGE_SIZE, -int(-MIN_OBJECT // level.min_size))
        raise InputError(
            f"world config: image_size {config.image_size} is too small to tell the pictograms of difficulty "
            f"{config.difficulty!r} apart; it must be at least {needed}"
        )
    if level.max_objects * level.min_size**2 > 0.36:  # a denser picture has no place left for the last object
        most = int(0.36 / level.min_size**2)
        raise InputError(
            f"world config: max_objects {level.max_objects} do not fit into a picture of difficulty "
            f"{config.difficulty!r}; at most {most} do"
        )
    if level.grid and (most := _grid_capacity(level)) < level.max_objects:
        raise InputError(
            f"world config: a grid of {level.grid} holds {most} of the objects of difficulty {config.difficulty!r}, but "
            f"max_objects is {level.max_objects}; choose a finer grid, or 0 for objects anywhere"
        )
    if level.colours - math.ceil(config.held_out_share * level.colours) < 2:
        raise InputError(
            f"world config: held_out_share {config.held_out_share} leaves training fewer than 2 of {level.colours} "
            "colours per object; lower held_out_share or raise colours"
        )
    noise, counts = config.noise, config.counts
    if noise.file_name + noise.boilerplate + noise.wrong > 1:
        raise InputError("world config: noise.file_name + noise.boilerplate + noise.wrong is more than 1")
    for key, multiple in (("pope", 6), ("mme", 10), ("gqa", 2)):
        if getattr(counts.benchmarks, key) % multiple:
            raise InputError(
                f"world config: counts.benchmarks.{key} is {getattr(counts.benchmarks, key)}; "
                f"it must be a multiple of {multiple}"
            )
