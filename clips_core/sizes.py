"""The sizes of CLIPS models as data: what `model: {size: B/16, image_size: 112}` in a recipe stands for. Imports no torch.

Image towers, texts and decoders are the paper's, but for Ti/16, of which only the image tower is published. The head width is
64 throughout, with one exception: 80 in the image tower of H/14.
"""

import difflib
from collections.abc import Mapping
from typing import Any


def _transformer(width: int, layers: int, heads: int) -> dict[str, int]:
    return {"width": width, "layers": layers, "heads": heads}


def _size(patch_size: int, vision: dict[str, int], text: dict[str, int]) -> dict[str, Any]:
    """The caption decoder is as large as the text encoder, and the shared space as wide, in every published size."""
    return {"patch_size": patch_size, "vision": vision, "text": text, "decoder": text, "embed_dim": text["width"]}


SIZES: dict[str, dict[str, Any]] = {
    "Ti/16": _size(16, _transformer(192, 12, 3), _transformer(192, 12, 3)),  # texts and decoder: our choice
    "S/16": _size(16, _transformer(384, 12, 6), _transformer(384, 12, 6)),
    "B/16": _size(16, _transformer(768, 12, 12), _transformer(512, 12, 8)),
    "L/16": _size(16, _transformer(1024, 24, 16), _transformer(768, 12, 12)),
    "L/14": _size(14, _transformer(1024, 24, 16), _transformer(768, 12, 12)),
    "H/14": _size(14, _transformer(1280, 32, 16), _transformer(1024, 24, 16)),
    # For trying a recipe on a CPU. 28 divides every resolution of the stages (84, 112, 224, 336).
    "debug": _size(28, _transformer(32, 2, 2), _transformer(32, 2, 2)),
}


def fill_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with everything that its `size` says and it does not say itself; the same values where it names no size.

    A transformer may be given in part (`vision: {layers: 6}`), and `decoder: null` leaves the decoder out.

    Raises:
        ValueError: if there is no such size.
    """
    size = values.get("size")
    if size is None:
        return dict(values)
    if not isinstance(size, str) or size not in SIZES:
        match = difflib.get_close_matches(str(size), list(SIZES), n=1, cutoff=0.3)
        nearest = f" (did you mean {match[0]!r}?)" if match else ""
        raise ValueError(f"no size {size!r}{nearest}: the sizes are {', '.join(SIZES)}")
    filled = {**SIZES[size], **values}
    for part in ("vision", "text", "decoder"):
        if isinstance(filled[part], Mapping):
            filled[part] = {**SIZES[size][part], **filled[part]}
    return filled
