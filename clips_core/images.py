"""Opening a picture that comes from who knows where."""

import io
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from clips_core.errors import BadSample, InputError

MAX_PIXELS = 64 * 2**20  # beyond that a small file can unpack to gigabytes (a decompression bomb)
# PIL goes by a file's content, not its name, and knows formats that start other programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def open_image(source: bytes | Path, name: str, at_least: tuple[int, int] | None = None) -> Image.Image:
    """A whole picture as RGB, transparency laid on white.

    Args:
        name: what an error calls the picture.
        at_least: width and height that are enough: a larger JPEG may come at 1/2, 1/4 or 1/8 of its size, not smaller
            than this, which its decoder does while decoding and in a fraction of the time. Other formats come whole.

    Raises:
        BadSample: naming `name`, if it is truncated ("damaged picture"), "not a picture", or has more than `MAX_PIXELS`
            pixels ("too many pixels").
        InputError: if there is no such file.
    """
    cause = "not a picture"
    try:
        with warnings.catch_warnings():
            # PIL warns about bombs at its own, larger limit; ours is checked below, before anything is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width} × {image.height}"
                    raise BadSample(
                        "too many pixels", f"{name}: {size} pixels is over the limit of {MAX_PIXELS // 2**20} Mpx"
                    )
                cause = "damaged picture"  # its header was readable
                if at_least is not None and image.format == "JPEG":
                    image.draft(None, at_least)
                image.load()
                return _to_rgb(image)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise BadSample(cause, f"{name}: not a readable picture (none of {', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels", f"{name}: over the pixel limit ({error})") from None
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise BadSample(cause, f"{name}: not a readable picture ({type(error).__name__}: {error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")
