"""Crops and colours against torchvision's functions, and the promised distributions."""

import colorsys
import io

import numpy as np
import pytest
import torchvision.transforms.v2.functional as functional
from PIL import Image

from clips_core.augment import (
    WHOLE,
    brightness,
    colour_jitter,
    contrast,
    crop_and_squash,
    crop_box,
    enough_pixels,
    hue,
    saturation,
)
from clips_core.images import open_image


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(width: int, height: int) -> Image.Image:
    """A picture such as a camera takes: neighbours are alike."""
    return picture(8, 6).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("factor", [0.68, 0.9, 1.0, 1.32])
def test_colours_change_as_in_torchvision(factor: float) -> None:
    image = picture()
    for ours, theirs in [
        (brightness, functional.adjust_brightness),
        (contrast, functional.adjust_contrast),
        (saturation, functional.adjust_saturation),
    ]:
        assert np.array_equal(ours(image, factor), theirs(image, factor)), ours
    assert np.array_equal(hue(image, factor - 1), functional.adjust_hue(image, factor - 1))


def test_hue_turns_by_the_stated_share_of_the_circle() -> None:
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    for turn in (1 / 3, -1 / 3, 0.08):
        pixel = hue(red, turn).getpixel((0, 0))
        assert isinstance(pixel, tuple)
        assert abs(colorsys.rgb_to_hsv(*(value / 255 for value in pixel))[0] - turn % 1) < 0.01


def test_jitter_leaves_a_fifth_alone_and_makes_a_fifth_grey() -> None:
    image, rng, count = picture(6, 4), np.random.default_rng(0), 3000
    results = [np.asarray(colour_jitter(image, 0.4, rng)).astype(int) for _ in range(count)]
    grey = np.mean([np.ptp(result, axis=2).max() == 0 for result in results])
    same = np.mean([np.array_equal(result, image) for result in results])
    for share, expected in ((grey, 0.2), (same, 0.2 * 0.8)):
        assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
    # A grey picture stays grey whatever its hue and saturation; brightness and contrast move its mean by at most 0.32 each way.
    flat = Image.new("RGB", (4, 4), (100, 100, 100))
    means = [np.asarray(colour_jitter(flat, 0.4, rng)).mean() for _ in range(1000)]
    assert 66 <= min(means) < 72 and 128 < max(means) <= 134


def test_jitter_depends_on_the_generator_alone() -> None:
    a, b = (colour_jitter(picture(), 0.4, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(a, b) and not np.array_equal(a, colour_jitter(picture(), 0.4, np.random.default_rng(6)))


def test_crops_keep_the_area_and_nearly_the_sides_ratio() -> None:
    rng = np.random.default_rng(0)
    boxes = [crop_box(0.4, rng) for _ in range(3000)]
    sides = np.array([(right - left, bottom - top) for left, top, right, bottom in boxes])
    areas, ratios = sides.prod(axis=1), sides[:, 0] / sides[:, 1]
    assert areas.min() >= 0.4 - 1e-9 and areas.min() < 0.41 and areas.max() > 0.95
    assert ratios.min() >= 3 / 4 - 1e-9 and ratios.max() <= 4 / 3 + 1e-9 and abs(np.log(ratios).mean()) < 0.02
    assert all(0 <= left < right <= 1 + 1e-12 and 0 <= top < bottom <= 1 + 1e-12 for left, top, right, bottom in boxes)
    middles = np.array([((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in boxes])
    assert np.abs(middles.mean(axis=0) - 0.5).max() < 0.01
    assert crop_box(1.0, rng) == WHOLE


@pytest.mark.parametrize("box", [(0, 0, 60, 40), (10, 4, 50, 36), (30, 0, 60, 17)])
def test_crop_and_resize_in_one_pass_equal_both_in_turn(box: tuple[int, int, int, int]) -> None:
    image = picture()
    left, top, right, bottom = box
    got = crop_and_squash(image, (left / 60, top / 40, right / 60, bottom / 40), 16)
    want = functional.resized_crop(image, top, left, bottom - top, right - left, [16, 16], antialias=True)
    difference = np.abs(np.asarray(got).astype(int) - np.asarray(want).astype(int))
    if box == (0, 0, 60, 40):
        assert difference.max() == 0
    # At the crop's border the one pass also sees the pixels beside it.
    assert difference[2:-2, 2:-2].max() <= 1 and difference.mean() < 3


def test_a_large_jpeg_is_decoded_small_and_looks_the_same() -> None:
    buffer = io.BytesIO()
    smooth(640, 480).save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    box = (0.1, 0.2, 0.9, 0.8)
    assert enough_pixels(box, 56) == (70, 94) and enough_pixels(WHOLE, 56) == (56, 56)
    for size, decoded in [(56, (160, 120)), (112, (320, 240)), (224, (640, 480))]:
        image = open_image(data, "x", enough_pixels(box, size))
        assert image.size == decoded
        small = np.asarray(crop_and_squash(image, box, size)).astype(int)
        whole = np.asarray(crop_and_squash(open_image(data, "x"), box, size)).astype(int)
        assert np.abs(small - whole).mean() < 2
    png = io.BytesIO()
    smooth(640, 480).save(png, "PNG")
    assert np.array_equal(open_image(png.getvalue(), "x", (56, 56)), smooth(640, 480))  # exact
