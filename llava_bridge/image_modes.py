"""How a picture of any shape becomes the square ones that a tower reads: three image processors, all stock transformers'.

- `square`: the tower's own processor (most squash or crop).
- `pad`: LLaVA-1.5's. A border of the mean colour makes the picture square first; then the tower's own processor.
- `anyres`: LLaVA-NeXT's. The whole picture, and tiles of it at up to three times the tower's size.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaImageProcessorPil, LlavaNextImageProcessorPil

from clips_core.errors import InputError
from llava_bridge.config import ImageMode
from llava_bridge.towers import Tower

# What the three have in common: from a picture to normalised pixels.
_SETTINGS = ("size", "crop_size", "resample", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize",
             "image_mean", "image_std", "do_convert_rgb")  # fmt: skip


def image_processor(tower: Tower, mode: ImageMode) -> Any:
    """The processor of an MLLM around `tower`.

    Raises:
        InputError: if the tower cannot be read that way, saying why.
    """
    if mode == "square":
        return tower.image_processor
    own = tower.image_processor
    settings = {name: value for name in _SETTINGS if (value := getattr(own, name, None)) is not None}
    settings |= {name: dict(settings[name]) for name in ("size", "crop_size")}
    settings["do_center_crop"] = bool(settings.get("do_center_crop"))  # several have no such step
    if mode == "pad":
        processor = LlavaImageProcessorPil(**settings, do_pad=True)
        _check_same_on_squares(tower, processor, [(tower.image_size * 2 + 1,) * 2, (tower.image_size - 1,) * 2])
        return processor
    if tower.num_register_tokens:
        raise InputError(
            f"image_mode anyres: LLaVA-NeXT lays a tile's tokens out as a grid of patches, which the {tower.num_register_tokens} "
            f"register tokens of tower {tower.spec!r} have no place in; take image_mode square or pad, or a tower without registers"
        )
    # A tile is made at the tower's size and read as it is: nothing is cut off it, whatever the tower's own processor crops.
    side = tower.image_size
    tiles = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "do_center_crop": False}
    processor = LlavaNextImageProcessorPil(**{**settings, **tiles}, image_grid_pinpoints=grid_pinpoints(side))
    if not settings["do_center_crop"]:
        _check_same_on_squares(tower, processor, [(side, side)])
    return processor


def grid_pinpoints(image_size: int) -> list[list[int]]:
    """LLaVA-NeXT's grids, as height and width in pixels: 1 × 2, 2 × 1, 2 × 2, 3 × 1 and 1 × 3 tiles of the tower's size."""
    return [[rows * image_size, columns * image_size] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def _check_same_on_squares(tower: Tower, processor: Any, sizes: list[tuple[int, int]]) -> None:
    """A square picture needs no border and, at the tower's size, no tiles' resizing: the pixels must be the tower's own."""
    rng = np.random.default_rng(0)
    for width, height in sizes:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        own = tower.image_processor(picture, return_tensors="pt")["pixel_values"][0]
        found = processor(picture, return_tensors="pt")["pixel_values"][0]
        found = found[0] if found.ndim == 4 else found  # of anyres, the whole picture
        if found.shape != own.shape or not torch.equal(found, own):
            raise InputError(
                f"tower {tower.spec!r}: of a square picture, its {type(tower.image_processor).__name__} makes other pixels than "
                f"{type(processor).__name__}, so it would see pictures that it was not trained on; take image_mode square"
            )
