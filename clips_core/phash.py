"""Pictures that look the same: a perceptual hash, and a search for near hashes among many.

The hash says which of a picture's 63 lowest frequencies are above their median. It survives another size, another
format and strong compression; it does not survive cropping, mirroring or turning.
"""

import itertools

import numpy as np
from PIL import Image

SIDE, LOW = 32, 8  # pixels of the reduced picture; frequencies that are kept in each direction
# A picture whose median frequency is weaker than this (grey levels, of an orthonormal transform) is as good as blank: its bits
# would be rounding errors, and all blank pictures would be copies of one another. Photographs have 20 and more.
LEAST_DETAIL = 2.0

_ROWS = np.sqrt(2 / SIDE) * np.cos(np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(LOW)[:, None])  # [LOW, SIDE]
_ROWS[0] /= np.sqrt(2)
_POWERS = np.uint64(1) << np.arange(LOW * LOW - 1, dtype=np.uint64)
_BITS_SET = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def perceptual_hash(image: Image.Image) -> int | None:
    """The hash of an RGB picture, 63 bits; None if it is blank, or too smooth to tell it from others."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float64)
    frequencies = (_ROWS @ grey @ _ROWS.T).ravel()[1:]  # without the mean brightness
    if np.median(np.abs(frequencies)) < LEAST_DETAIL:
        return None
    return int(_POWERS[frequencies > np.median(frequencies)].sum())


class NearHashes:
    """Finds, for many hashes, the nearest of a few thousand stored ones within a distance.

    Two hashes that differ in at most d of their bits agree in at least one of d + 1 bands of bits. So each band has a sorted
    table, and only hashes that share a band are compared.

    Args:
        stored: uint64 [E].
        distance: bits that may differ, 0 … 15.
    """

    def __init__(self, stored: np.ndarray, distance: int):
        self.stored, self.distance = stored, distance
        edges = np.linspace(0, 64, distance + 2).astype(int)
        self._bands = []
        for low, high in itertools.pairwise(edges.tolist()):
            band = _band(stored, low, high)
            order = np.argsort(band, kind="stable")
            self._bands.append((low, high, order, band[order]))

    def nearest(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For uint64 [T]: number of the nearest stored hash, the first of equals, or -1, and its distance; int64 [T] both."""
        best = np.full(len(hashes), -1, np.int64)
        least = np.full(len(hashes), self.distance + 1, np.int64)
        for start in range(0, len(hashes), 256):  # at most 256 × E pairs at a time
            part = slice(start, start + 256)
            best[part], least[part] = self._nearest(hashes[part])
        return best, least

    def _nearest(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        queries, candidates = [], []
        for low, high, order, table in self._bands:
            band = _band(hashes, low, high)
            first, stop = np.searchsorted(table, band, "left"), np.searchsorted(table, band, "right")
            query = np.repeat(np.arange(len(hashes)), stop - first)
            # 0, 1, 2, … within each query's run
            within = np.arange(len(query)) - np.repeat(np.cumsum(stop - first) - (stop - first), stop - first)
            queries.append(query)
            candidates.append(order[np.repeat(first, stop - first) + within])
        query, candidate = np.concatenate(queries), np.concatenate(candidates)
        apart = differing_bits(hashes[query], self.stored[candidate])
        order = np.lexsort((candidate, apart, query))
        query, candidate, apart = query[order], candidate[order], apart[order]
        best = np.full(len(hashes), -1, np.int64)
        least = np.full(len(hashes), self.distance + 1, np.int64)
        found, at = np.unique(query, return_index=True)
        near = apart[at] <= self.distance
        best[found[near]], least[found[near]] = candidate[at[near]], apart[at[near]]
        return best, least


def differing_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hamming distance of uint64 [n] and uint64 [n]: int64 [n]."""
    different = np.ascontiguousarray(a ^ b).view(np.uint8).reshape(-1, 8)
    return _BITS_SET[different].sum(axis=1, dtype=np.int64)


def _band(hashes: np.ndarray, low: int, high: int) -> np.ndarray:
    return (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
