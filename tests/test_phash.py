"""The perceptual hash on pictures that are made anew, and its search against comparing all with all."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from clips_core.phash import NearHashes, differing_bits, perceptual_hash


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Soft blobs of colour: as photographs, most of it is in low frequencies."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer).convert("RGB")


def bits_between(a: int | None, b: int | None) -> int:
    assert a is not None and b is not None
    return (a ^ b).bit_count()


@pytest.mark.parametrize(
    ("kind", "quality", "size"),
    [("JPEG", 40, (160, 120)), ("JPEG", 75, (320, 240)), ("WEBP", 60, (80, 60)), ("PNG", 0, (112, 112))],
)
def test_a_copy_has_nearly_the_same_hash(kind: str, quality: int, size: tuple[int, int]) -> None:
    options = {} if kind == "PNG" else {"quality": quality}
    distances = [
        bits_between(perceptual_hash(s), perceptual_hash(saved(s.resize(size), kind, **options)))
        for s in map(scene, range(40))
    ]
    assert max(distances) <= 4


def test_other_pictures_have_other_hashes() -> None:
    hashes = [perceptual_hash(scene(seed)) for seed in range(100)]
    distances = [bits_between(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 8
    assert abs(np.mean(distances) - 31.5) < 2  # as of independent bits


def test_bits_are_frequencies_above_their_median() -> None:
    picture = scene(7)
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR), float)
    low = dctn(grey, norm="ortho")[:8, :8].ravel()[1:]
    assert perceptual_hash(picture) == sum(1 << i for i in range(63) if low[i] > np.median(low))


def test_blank_pictures_have_no_hash() -> None:
    noise = np.random.default_rng(0).normal(0, 3, (256, 256, 3))
    slope = np.tile(np.linspace(0, 255, 256), (256, 1))
    for pixels in (np.full((50, 50, 3), 255), np.zeros((8, 8, 3)), 200 + noise, np.stack([slope] * 3, axis=-1)):
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        assert perceptual_hash(picture) is None
        assert perceptual_hash(saved(picture, "JPEG", quality=60)) is None


@pytest.mark.parametrize("distance", [0, 1, 4, 9, 15])
def test_search_finds_what_comparing_all_finds(distance: int) -> None:
    generator = np.random.default_rng(distance)
    # With few values in most bytes, many hashes share a band without being near.
    stored = generator.integers(0, 2**63, 300, dtype=np.uint64) & np.uint64(0x7FFF00FF000F01FF)
    flips = [sum(1 << int(b) for b in generator.choice(63, k, replace=False)) for k in range(18) for _ in range(30)]
    asked = stored[generator.integers(0, 300, len(flips))] ^ np.array(flips, np.uint64)
    best, least = NearHashes(stored, distance).nearest(asked)
    table = np.array([[(int(a) ^ int(s)).bit_count() for s in stored] for a in asked])
    near = table.min(axis=1) <= distance
    assert np.array_equal(best, np.where(near, table.argmin(axis=1), -1))
    assert np.array_equal(least[near], table.min(axis=1)[near]) and near.any() and not near.all()


def test_nothing_stored_and_nothing_asked() -> None:
    nothing = np.zeros(0, np.uint64)
    assert NearHashes(nothing, 4).nearest(np.arange(3, dtype=np.uint64))[0].tolist() == [-1, -1, -1]
    assert NearHashes(np.arange(3, dtype=np.uint64), 4).nearest(nothing)[0].tolist() == []
    assert differing_bits(nothing, nothing).tolist() == []
