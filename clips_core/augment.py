"""Random crop and colour jitter of a training picture, every draw from the generator that is passed in."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance

Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of width and height
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

# Of the authors' configuration, which has SimCLR's recipe.
JITTER_PROBABILITY = 0.8
GREY_PROBABILITY = 0.2


def crop_box(least_area: float, rng: np.random.Generator) -> Box:
    """A random part of at least `least_area` of a picture, its sides' ratio changed by at most 4:3 either way.

    In shares of the sides, so that it can be drawn before the picture is decoded.
    """
    for _ in range(10):
        area, ratio = rng.uniform(least_area, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = float(np.sqrt(area * ratio)), float(np.sqrt(area / ratio))
        if width <= 1 and height <= 1:
            left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
            return left, top, left + width, top + height
    return WHOLE


def enough_pixels(box: Box, size: int) -> tuple[int, int]:
    """Width and height of the whole picture at which `box` has `size` × `size` pixels: more would be thrown away."""
    left, top, right, bottom = box
    return int(np.ceil(size / (right - left))), int(np.ceil(size / (bottom - top)))


def crop_and_squash(image: Image.Image, box: Box, size: int) -> Image.Image:
    """`box` of the picture as `size` × `size` pixels, bilinear, in one pass."""
    if box == WHOLE and image.size == (size, size):
        return image
    left, top, right, bottom = box
    pixels = (
        left * image.width,
        top * image.height,
        min(right * image.width, image.width),  # not beyond the border by a rounding error
        min(bottom * image.height, image.height),
    )
    return image.resize((size, size), Image.Resampling.BILINEAR, box=pixels)


def colour_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """With probability 0.8, brightness, contrast, saturation and hue changed in random order; then with 0.2, grey.

    The first three by a factor within 1 ± 0.8 × strength, hue by at most 0.2 × strength of the colour circle.
    """
    if rng.random() < JITTER_PROBABILITY:
        low, high = 1 - 0.8 * strength, 1 + 0.8 * strength
        changes: list[Callable[[Image.Image, float], Image.Image]] = [brightness, contrast, saturation, hue]
        amounts = [*rng.uniform(low, high, size=3), rng.uniform(-0.2 * strength, 0.2 * strength)]
        for i in rng.permutation(4):
            image = changes[i](image, float(amounts[i]))
    if rng.random() < GREY_PROBABILITY:
        image = image.convert("L").convert("RGB")
    return image


def brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn the hue by a share of the colour circle, -0.5 … 0.5."""
    h, s, v = image.convert("HSV").split()
    shift = int(turn * 255)
    h = h.point([(value + shift) % 256 for value in range(256)])
    return Image.merge("HSV", (h, s, v)).convert("RGB")
