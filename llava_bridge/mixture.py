"""How long the samples of LLaVA-1.5's two data sets are, as distributions to draw from: for plans and benchmarks. Imports no torch.

The numbers of records are the files' own. Nobody has published the lengths, so those are assumptions, made from what each source
is made of: how many questions it asks of a picture (VQAv2 5, GQA 13, Visual Genome and RefCOCO about 10, with boxes in
digits), how long one is with its answer, and 35 tokens of Vicuna's system prompt. A plan's `text_tokens` overrides them.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

Stage = Literal["align", "tune"]


class Source(NamedTuple):
    """One of the sources that a data set is mixed from. Lengths of its text are log-normal."""

    records: int
    text: float  # mean tokens of a sample without its picture, template included
    spread: float  # standard deviation of the lengths' logarithm
    learned: float  # share of them that have a label
    picture: bool = True


MIXTURES: Mapping[Stage, Mapping[str, Source]] = {
    "align": {"LCS-558K": Source(558_128, 16, 0.35, 0.90)},  # BLIP's captions: ten words or so
    "tune": {  # mix-665K
        "LLaVA-Instruct": Source(157_712, 290, 0.45, 0.60),
        "ShareGPT": Source(40_688, 1_900, 0.90, 0.80, picture=False),  # many are cut at 2,048
        "VQAv2": Source(82_783, 150, 0.25, 0.12),
        "GQA": Source(72_140, 300, 0.35, 0.12),
        "OKVQA": Source(8_998, 70, 0.20, 0.06),
        "OCR-VQA": Source(80_000, 170, 0.30, 0.25),
        "A-OKVQA": Source(66_160, 110, 0.20, 0.04),
        "TextCaps": Source(21_953, 130, 0.30, 0.15),
        "RefCOCO": Source(48_447, 330, 0.55, 0.50),
        "Visual Genome": Source(86_417, 450, 0.30, 0.45),
    },
}


class Drawn(NamedTuple):
    """Samples of a mixture, each an array [n]."""

    text: np.ndarray  # int64: tokens of text
    learned: np.ndarray  # int64: of those, the ones with a label
    picture: np.ndarray  # bool


def draw(sources: Mapping[str, Source], count: int, seed: int = 0) -> Drawn:
    """So many samples, each from a source by its share of the records; none shorter than four tokens."""
    rng = np.random.default_rng(seed)
    table = list(sources.values())
    records = np.array([source.records for source in table])
    kind = rng.choice(len(table), count, p=records / records.sum())
    mean, spread, share = (np.array([source[key] for source in table])[kind] for key in (1, 2, 3))
    text = np.exp(np.log(mean) - spread**2 / 2 + spread * rng.standard_normal(count))
    text = np.maximum(4, text.round()).astype(np.int64)
    learned = np.clip((share * text).round(), 1, text - 1).astype(np.int64)
    return Drawn(text, learned, np.array([source.picture for source in table])[kind])
