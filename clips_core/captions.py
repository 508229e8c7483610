"""What the text encoder reads of a synthetic caption: short parts of it work much better than the whole (the paper's
inverse effect, section 3.1)."""

import re
from collections.abc import Sequence

import numpy as np

from clips_core.config import Method, Strategy, TextConfig
from clips_core.tokenizer import PAD, ClipsTokenizer


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


def shorten(body: Sequence[int], strategy: Strategy, length: int, rng: np.random.Generator) -> Sequence[int]:
    """At most `length` tokens of a caption's body, in their order (the paper's section 3.1).

    `truncation` and `sub_caption` keep the first ones (of the sub-caption, which was chosen before), `block_mask` a run that
    starts anywhere, `random_mask` any.
    """
    surplus = len(body) - length
    if surplus <= 0:
        return body
    if strategy == "random_mask":
        return [body[i] for i in np.sort(rng.choice(len(body), length, replace=False))]
    start = int(rng.integers(surplus + 1)) if strategy == "block_mask" else 0
    return body[start : start + length]


def texts_and_target(
    web: str,
    synthetic: str,
    method: Method,
    texts: TextConfig,
    tokenizer: ClipsTokenizer,
    context_length: int,
    target_length: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """What the text encoder reads of a picture's captions, and what the caption decoder shall write.

    Args:
        synthetic: "" where the picture has none: then its web caption stands for it, and nothing is to be written.

    Returns:
        ids of the texts, int64 [K, context_length]: web and shortened synthetic caption for `clips`, else one text;
        ids of the target, int64 [target_length]: the full synthetic caption for `clips`, the encoded one for `coca`, else pads.
    """

    def shortened(caption: str) -> Sequence[int]:
        return shorten(tokenizer.body(caption), texts.strategy, texts.length or context_length - 3, rng)

    def part_of_synthetic() -> Sequence[int]:
        return shortened(sub_caption(synthetic, web, rng) if texts.strategy == "sub_caption" else synthetic or web)

    target = ""
    match method:
        case "clips":
            bodies, target = [tokenizer.body(web), part_of_synthetic()], synthetic
        case "clip":
            bodies = [shortened(web) if texts.source == "web" else part_of_synthetic()]
        case _:
            caption = mixed_caption(synthetic, web, rng)
            bodies, target = [tokenizer.body(caption)], caption if method == "coca" else ""
    ids = tokenizer.frame(bodies, context_length)
    return ids, tokenizer.encode_target(target, target_length) if target else np.full(target_length, PAD, np.int64)
