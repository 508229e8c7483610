"""Which sample comes at which position of a training run: a pure function of seed and position.

A *chunk* is what is read together: a tar, a row group of a parquet file, some lines of a listing. Only the number of samples in
each is known here. An epoch permutes the chunks and takes them in groups of `shuffle_chunks`; the samples of a group are permuted
jointly. So a set of few chunks is shuffled as a whole, and of 100,000 chunks a loader has a handful open at a time.

Chunks are dealt to *lanes*, which run side by side: position p comes from lane p mod L. Rows of a batch are sorted by lane, so that
with as many lanes as processes no two processes read the same chunk.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clips_core.errors import InputError

BLOCK = 1000  # consecutive positions of a lane in which each source has exactly its share


class Group(NamedTuple):
    """Chunks whose samples are permuted jointly, in one epoch of one lane of one source."""

    epoch: int
    start: int  # place in the lane's epoch of the group's first sample
    chunks: np.ndarray  # int64 [C]: numbers of the chunks
    chunk: np.ndarray  # int32 [n]: sample by sample, its chunk, as an index into `chunks`
    number: np.ndarray  # int32 [n]: and its number in that chunk


class Place(NamedTuple):
    """Where the sample of a position comes from."""

    source: int
    lane: int
    group: Group
    offset: int  # in the group


class SourceOrder:
    """The order of one source, lane by lane.

    An epoch ends for all lanes with the shortest of them. Lanes hold as many samples as each other but for at most the largest
    chunk, so an epoch leaves out at most (lanes − 1) × the largest chunk, other samples in every epoch; with one lane, none.

    Args:
        counts: samples of each chunk, int64 [C].
        seed: further numbers tell this source from others.

    Raises:
        InputError: if there are fewer chunks than lanes.
    """

    def __init__(self, counts: np.ndarray, seed: Sequence[int], lanes: int, shuffle_chunks: int):
        self.counts, self.seed, self.shuffle_chunks = counts, tuple(seed), shuffle_chunks
        self.lanes = deal(counts, lanes, np.random.default_rng([*self.seed, 0]))
        self.lane_length = min(int(counts[chunks].sum()) for chunks in self.lanes)  # samples of a lane in an epoch
        self._current: dict[
            int, Group
        ] = {}  # by lane: positions are read in order, so the last group is the next one's

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_current": {}}

    def __call__(self, lane: int, time: int) -> tuple[Group, int]:
        """The group, and the place in it, of a lane's sample number `time`, counted on from epoch to epoch."""
        epoch, place = divmod(time, self.lane_length)
        group = self._current.get(lane)
        if group is None or group.epoch != epoch or not 0 <= place - group.start < len(group.number):
            group = self._current[lane] = self._group(lane, epoch, place)
        return group, place - group.start

    def following(self, lane: int, group: Group) -> np.ndarray:
        """The chunks of the group that comes after this one, int64 [C]."""
        place = group.start + len(group.number)
        return self._chunks(lane, group.epoch + place // self.lane_length, place if place < self.lane_length else 0)[2]

    def _chunks(self, lane: int, epoch: int, place: int) -> tuple[int, int, np.ndarray]:
        """Number, start and chunks of the group that a place of the lane's epoch is in."""
        chunks = np.random.default_rng([*self.seed, 1, lane, epoch]).permutation(self.lanes[lane])
        ends = np.cumsum(self.counts[chunks])
        number = int(np.searchsorted(ends, place, side="right")) // self.shuffle_chunks
        first = number * self.shuffle_chunks
        return number, int(ends[first - 1]) if first else 0, chunks[first : first + self.shuffle_chunks]

    def _group(self, lane: int, epoch: int, place: int) -> Group:
        number, start, chunks = self._chunks(lane, epoch, place)
        counts = self.counts[chunks]
        chunk = np.repeat(np.arange(len(chunks), dtype=np.int32), counts)
        index = np.arange(len(chunk), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts).astype(np.int32)
        shuffled = np.random.default_rng([*self.seed, 2, lane, epoch, number]).permutation(len(chunk))
        return Group(epoch, start, chunks, chunk[shuffled], index[shuffled])


class Order:
    """The order of several sources, mixed by weight.

    Of every `BLOCK` consecutive samples of a lane, each source gives its share, rounded by largest remainder; which of them are
    its is drawn anew for each block. Each source has epochs of its own.

    Args:
        counts: per source, the samples of its chunks, int64 [C].
        weights: per source; they need not sum to 1.
        seed, lanes, shuffle_chunks: see the module.

    Raises:
        InputError: if a source has fewer chunks than there are lanes, or too small a weight to ever be read.
    """

    def __init__(
        self, counts: Sequence[np.ndarray], weights: Sequence[float], seed: int, lanes: int, shuffle_chunks: int
    ):
        self.seed, self.lanes = seed, lanes
        self.sources = [SourceOrder(c, [seed, 0, i], lanes, shuffle_chunks) for i, c in enumerate(counts)]
        self.quotas = shares(weights, BLOCK)
        if not self.quotas.all():
            source = int(np.flatnonzero(self.quotas == 0)[0])
            raise InputError(
                f"data.train: the weight of source {source + 1} is less than 1 in {2 * BLOCK} of all weights"
            )
        self._blocks: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}  # by lane: the block in use

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_blocks": {}}

    def __call__(self, position: int) -> Place:
        time, lane = divmod(position, self.lanes)
        source = 0
        if len(self.sources) > 1:
            block, place = divmod(time, BLOCK)
            if lane not in self._blocks or self._blocks[lane][0] != block:
                self._blocks[lane] = (block, *self._mixture(lane, block))
            _, pattern, rank = self._blocks[lane]
            source = int(pattern[place])
            time = block * int(self.quotas[source]) + int(rank[place])
        return Place(source, lane, *self.sources[source](lane, time))

    def _mixture(self, lane: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in a block, its source and how many of that source come before it in the block, both [BLOCK]."""
        pattern = np.repeat(np.arange(len(self.quotas)), self.quotas)
        pattern = np.random.default_rng([self.seed, 1, lane, block]).permutation(pattern)
        rank = np.empty_like(pattern)
        for source, quota in enumerate(self.quotas):
            rank[pattern == source] = np.arange(quota)
        return pattern, rank


def deal(counts: np.ndarray, lanes: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal chunks to lanes: in random order, each to the lane with the fewest samples so far.

    The samples of two lanes then differ by at most the largest chunk. Dealt once and not per epoch, so that all epochs are
    of one length.
    """
    if len(counts) < lanes:
        raise InputError(
            f"data.lanes={lanes}, but a source has only {len(counts)} chunks (tars, row groups of parquet files); set fewer "
            "lanes, or write smaller shards"
        )
    if lanes == 1:
        return [np.arange(len(counts))]
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    least = [(0, lane) for lane in range(lanes)]  # a heap of (samples, lane)
    for chunk in rng.permutation(len(counts)):
        samples, lane = least[0]
        dealt[lane].append(int(chunk))
        heapq.heapreplace(least, (samples + int(counts[chunk]), lane))
    return [np.array(chunks, dtype=np.int64) for chunks in dealt]


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers in proportion to the weights that sum to `total` (largest remainder), int64 [len(weights)]."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * total
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: total - quotas.sum()]] += 1
    return quotas


def rows(start: int, batch_size: int, lanes: int, rank: int, world_size: int) -> np.ndarray:
    """The positions that process `rank` reads of the global batch of positions `start` … `start + batch_size`, int64.

    Row i of the global batch comes from lane i × lanes // batch_size, and a process has consecutive rows.
    """
    positions = np.arange(start, start + batch_size)
    by_lane = positions[np.argsort(positions % lanes, kind="stable")]
    return by_lane[rank * batch_size // world_size : (rank + 1) * batch_size // world_size]
