"""What is measured of which towers. Imports no torch."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from clips_core.config import FORBID, Names
from clips_core.errors import InputError

KINDS = ("clips", "open_clip", "hf")  # of tower specs, as in llava_bridge.towers

ClassTask = Literal["zero_shot", "probe", "knn"]


@dataclass(config=FORBID)
class ClassSet:
    """Pictures that belong to classes."""

    # A folder with a folder of pictures for each class, or webdataset tars with a picture and its class's number in `cls`: a
    # folder of *.tar, a glob pattern, or one .tar.
    test: str
    train: str | None = None  # the same kind of thing, with the same classes: what probe and knn learn from
    tasks: list[ClassTask] = dataclasses.field(default_factory=lambda: ["zero_shot"])
    # What classes are called in prompts: imagenet (open_clip's names), folders (their own names), or a file with a line for each
    # class in their order. null: classnames.txt beside the pictures, else ImageNet's where the folders are called so, else folders.
    names: str | None = None
    # openai_imagenet (the 80 prompts), simple_imagenet (7), or a file with a prompt a line, {c} or {} for the name. null:
    # zeroshot_classification_templates.txt beside the pictures, else openai_imagenet.
    templates: str | None = None
    # How many pictures test and train are known to have. Another number (a download that was cut off) is an error; null: not known.
    test_count: int | None = Field(default=None, ge=1)
    train_count: int | None = Field(default=None, ge=1)

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks must name at least one of zero_shot, probe and knn, and none twice")
        if self.train is None and set(self.tasks) - {"zero_shot"}:
            raise ValueError(f"the task {' and '.join(t for t in self.tasks if t != 'zero_shot')} needs train")


@dataclass(config=FORBID)
class CaptionSet:
    """Pictures with captions, for retrieval both ways."""

    # Karpathy's dataset_coco.json or dataset_flickr30k.json, or webdataset tars: a folder of *.tar, a glob pattern, or one .tar.
    captions: str
    images: str | None = None  # the folder of the pictures that a JSON names; tars hold their own
    split: str = "test"  # of a JSON: the pictures with this split
    caption: Names = dataclasses.field(
        default_factory=lambda: ["txt"]
    )  # of tars, as evaluation.caption: a line a caption
    per_image: int | None = Field(default=5, ge=1)  # the first so many captions of each picture; null: all
    count: int | None = Field(default=None, ge=1)  # how many pictures it is known to have; another number is an error

    def __post_init__(self) -> None:
        if self.captions.endswith(".json") and self.images is None:
            raise ValueError("images must name the folder of the pictures that captions lists")
        if not self.captions.endswith(".json") and self.images is not None:
            raise ValueError("images goes with a .json of captions; tars hold their own pictures")


@dataclass(config=FORBID)
class ProbeConfig:
    """Logistic regression on frozen features."""

    # Strengths of the L2 penalty. That with the best accuracy on a held-out part of train is taken, and all of train fitted
    # with it.
    l2: list[float] = dataclasses.field(default_factory=lambda: [10.0**-power for power in range(8)])
    held_out: float = Field(default=0.2, gt=0, lt=1)  # share of each class's training pictures
    max_iterations: int = Field(default=1000, ge=1)  # of L-BFGS, for each fit
    seed: int = 0  # which pictures are held out

    def __post_init__(self) -> None:
        if not self.l2 or min(self.l2) <= 0 or len(set(self.l2)) < len(self.l2):
            raise ValueError("l2 must hold at least one strength greater than 0, and none twice")


@dataclass(config=FORBID)
class KnnConfig:
    """A vote of the nearest training pictures, as in DINO."""

    k: int = Field(default=20, ge=1)  # neighbours by cosine
    temperature: float = Field(default=0.07, gt=0)  # a neighbour's vote weighs exp(cosine / temperature)


@dataclass(config=FORBID)
class TowerEvalConfig:
    """Measure towers on sets of pictures."""

    towers: Names  # specs: clips:RUN|FOLDER|hf-hub:…, open_clip:ARCH/PRETRAINED|FOLDER|hf-hub:…, hf:FOLDER|ORG/NAME
    out: Path  # gets a folder for each tower, set and task, and the embeddings
    data: Path = Path(".")  # the paths of sets are relative to it
    classes: dict[str, ClassSet] = dataclasses.field(default_factory=dict)  # by name
    captions: dict[str, CaptionSet] = dataclasses.field(default_factory=dict)  # by name
    probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)
    knn: KnnConfig = dataclasses.field(default_factory=KnnConfig)
    image_size: int | None = Field(default=None, ge=1)  # pixels; null: each tower's own
    batch_size: int = Field(default=64, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast
    device: str = "auto"  # auto: cuda where there is one, else cpu
    workers: int = Field(default_factory=lambda: min(8, os.cpu_count() or 1), ge=1)  # threads that decode pictures

    def __post_init__(self) -> None:
        if not self.towers or len(set(self.towers)) < len(self.towers):
            raise ValueError("towers must name at least one tower, and none twice")
        for spec in self.towers:
            kind, _, name = spec.partition(":")
            if kind not in KINDS or not name:
                raise ValueError(f"tower {spec!r}: write KIND:NAME, with KIND one of {', '.join(KINDS)}")
        names = [*self.classes, *self.captions]
        if not names:
            raise ValueError("nothing to measure on: name a suite, or set classes.NAME.test or captions.NAME.captions")
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"the set's name {name!r} becomes a folder: letters, digits, dots and dashes only")
            if names.count(name) > 1:
                raise ValueError(f"{name!r} names a set of classes and one of captions; rename one of them")


def arrange(arguments: Sequence[str]) -> list[str]:
    """`SPEC … SUITE … key=value …`, in any order, as `load_settings` takes it: suites first, which are recipes, then overrides.

    Raises:
        InputError: for what is none of the three.
    """
    specs = [argument for argument in arguments if argument.startswith(tuple(f"{kind}:" for kind in KINDS))]
    rest = [argument for argument in arguments if argument not in specs]
    suites = [argument for argument in rest if "=" not in argument]
    for suite in suites:
        if ":" in suite and not suite.endswith((".yaml", ".yml")):
            raise InputError(
                f"{suite!r} is no tower, which is written KIND:NAME with KIND one of {', '.join(KINDS)}; nor is it a suite "
                "(a .yaml file, or the name of one that comes with the package), nor key=value"
            )
    towers = [f"towers={json.dumps(specs)}"] if specs else []
    return [*suites, *towers, *(argument for argument in rest if "=" in argument)]
