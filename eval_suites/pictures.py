"""What the model gets to see: each question's own picture, a blank one, or that of another question.

A model that answers as well without the picture has learnt the questions, not to look. `Swap` is applied to what a task
hands to the model; the tasks' own code knows nothing of it.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Literal

from PIL import Image

from clips_core.errors import InputError

Pictures = Literal["real", "blank", "shuffled"]
Swap = Callable[[int, int, Image.Image], Image.Image]
"""(doc_id, position among the question's pictures, its own picture) → the picture to show."""


def picture_id(picture: Image.Image) -> str:
    """The same for the same pixels, however they were stored."""
    digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()[:16]


def own(doc_id: int, position: int, picture: Image.Image) -> Image.Image:
    """The question's own picture."""
    return picture


def blank(mean: Sequence[float]) -> Swap:
    """A picture of the same size in one colour: the image processor's mean (RGB in 0-1), which normalises to zero."""
    red, green, blue = (round(255 * channel) for channel in mean)

    def swap(doc_id: int, position: int, picture: Image.Image) -> Image.Image:
        return Image.new("RGB", picture.size, (red, green, blue))

    return swap


def shuffled(ids: Sequence[Sequence[str]], load: Callable[[int, int], Image.Image], seed: str) -> Swap:
    """The task's pictures permuted so that no picture stands for itself.

    The permutation is one of *different* pictures, so questions that share a picture share the one they get instead.

    Args:
        ids: per question, the `picture_id` of each of its pictures.
        load: (doc_id, position) → that picture.
        seed: same seed, same permutation.

    Raises:
        InputError: if the task has fewer than two different pictures.
    """
    place: dict[str, tuple[int, int]] = {}
    for doc_id, of_question in enumerate(ids):
        for position, name in enumerate(of_question):
            place.setdefault(name, (doc_id, position))
    instead = dict(zip(place, derangement(list(place), seed), strict=True))

    def swap(doc_id: int, position: int, picture: Image.Image) -> Image.Image:
        return load(*place[instead[ids[doc_id][position]]])

    return swap


def derangement(items: Sequence[str], seed: str) -> list[str]:
    """`items` in an order in which none stands in its own place: one random cycle through all (Sattolo's algorithm)."""
    if len(items) < 2:
        raise InputError(f"pictures can't be shuffled: there are only {len(items)} different ones (raise limit)")
    rng = random.Random(seed)
    cycle = list(items)
    for last in range(len(cycle) - 1, 0, -1):
        other = rng.randrange(last)
        cycle[last], cycle[other] = cycle[other], cycle[last]
    return cycle
