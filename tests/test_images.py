"""Pictures from who knows where."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from clips_core.errors import InputError
from clips_core.images import open_image


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_modes_become_rgb_with_transparency_on_white() -> None:
    assert open_image(encode(Image.new("L", (3, 2), 7)), "x").getpixel((0, 0)) == (7, 7, 7)
    assert open_image(encode(Image.new("RGBA", (3, 2), (9, 9, 9, 0))), "x").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2))
    palette.putpalette([1, 2, 3] + [0] * 765)
    assert open_image(encode(palette), "x").getpixel((0, 0)) == (1, 2, 3)


def test_damaged_pictures_are_named() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG"):
        data = encode(noise, kind)
        with pytest.raises(InputError, match="shard 3, key 'x'"):
            open_image(data[: len(data) // 2], "shard 3, key 'x'")
    with pytest.raises(InputError, match="not a readable picture"):
        open_image(b"hello", "x")


def test_decompression_bomb_is_refused_before_decoding() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(InputError, match=r"bomb\.png.*(over the limit|pixel limit)"):
        open_image(bomb, "bomb.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_of_the_list_opens(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (250, 0, 0)).save(buffer, kind)
    image = open_image(buffer.getvalue(), "picture")
    assert image.size == (9, 7) and image.mode == "RGB"
    assert all(abs(a - b) < 12 for a, b in zip(image.getpixel((4, 3)), (250, 0, 0), strict=True))
