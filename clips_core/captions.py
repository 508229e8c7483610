"""What the text encoder reads of a synthetic caption: short parts of it work much better than the whole (the paper's
inverse effect, section 3.1)."""

import re

import numpy as np


def split_caption(caption: str) -> list[str]:
    """The sub-captions of a synthetic caption: its pieces between runs of `.` and `!`, empty ones dropped."""
    return [piece for piece in (part.strip() for part in re.split(r"[.!]+", caption)) if piece]


def sub_caption(synthetic: str, web: str, rng: np.random.Generator) -> str:
    """One sub-caption, uniformly at random; the web caption where the synthetic one has none."""
    pieces = split_caption(synthetic)
    return pieces[rng.integers(len(pieces))] if pieces else web


def mixed_caption(synthetic: str, web: str, rng: np.random.Generator, web_share: float = 0.8) -> str:
    """The paper's baseline: the web caption with probability `web_share`, else the full synthetic caption."""
    return web if not synthetic or rng.random() < web_share else synthetic
