"""The order of training samples, against plain counting and the properties that it promises."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from clips_core.errors import InputError
from clips_core.order import BLOCK, Order, Place, deal, rows, shares

COUNTS = np.array([7, 3, 11, 5, 1, 9, 4, 8])  # 48 samples in 8 chunks


def order(lanes: int = 1, shuffle_chunks: int = 3, seed: int = 0, counts: list[np.ndarray] | None = None) -> Order:
    counts = counts or [COUNTS]
    return Order(counts, [1.0] * len(counts), seed, lanes, shuffle_chunks)


def sample(place: Place) -> tuple[int, int, int]:
    """Source, chunk, number in the chunk."""
    group = place.group
    return place.source, int(group.chunks[group.chunk[place.offset]]), int(group.number[place.offset])


ALL = {(0, chunk, number) for chunk, count in enumerate(COUNTS) for number in range(count)}


def test_every_epoch_is_a_permutation_and_another_one() -> None:
    sequence = [sample(order()(position)) for position in range(3 * 48)]
    epochs = [sequence[start : start + 48] for start in (0, 48, 96)]
    assert all(len(epoch) == len(set(epoch)) and set(epoch) == ALL for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = order(seed=1)
    assert [sample(other(position)) for position in range(48)] != epochs[0]


def test_a_position_says_all_whatever_was_asked_before() -> None:
    for lanes in (1, 2):
        places = order(lanes)
        forward = [sample(places(position)) for position in range(200)]
        for position in np.random.default_rng(0).permutation(200):
            assert sample(places(int(position))) == forward[position]
            assert sample(order(lanes)(int(position))) == forward[position]


def test_a_group_mixes_its_chunks_and_no_others() -> None:
    """With groups of 3 chunks, an epoch is 3 + 3 + 2 chunks, one group after the other; few chunks are one group."""
    chunks = [sample(order()(position))[1] for position in range(48)]
    runs = [list(dict.fromkeys(chunks))[i : i + 3] for i in (0, 3, 6)]
    sizes = [int(COUNTS[run].sum()) for run in runs]
    assert sum(sizes) == 48
    for run, start, size in zip(runs, np.cumsum([0, *sizes]), sizes, strict=False):
        assert Counter(chunks[start : start + size]) == {chunk: COUNTS[chunk] for chunk in run}
    assert any(a != b for a, b in zip(chunks[: sizes[0]], sorted(chunks[: sizes[0]]), strict=True))
    whole = [sample(order(shuffle_chunks=8)(position)) for position in range(48)]
    firsts = Counter(sample(order(shuffle_chunks=8, seed=seed)(0))[1] for seed in range(400))
    assert set(whole) == ALL
    # The first sample of all is uniform: of each chunk as often as it has samples, within 4 standard errors.
    for chunk, count in enumerate(COUNTS):
        assert abs(firsts[chunk] - 400 * count / 48) < 4 * (400 * count / 48) ** 0.5 + 1


@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_lanes_share_no_chunk_and_leave_out_little(lanes: int) -> None:
    places = order(lanes)
    length = places.sources[0].lane_length
    chunks = defaultdict(set)
    left_out = []
    for epoch in range(3):
        seen = set()
        for position in range(epoch * length * lanes, (epoch + 1) * length * lanes):
            place = places(position)
            assert place.lane == position % lanes and place.group.epoch == epoch
            chunks[place.lane].add(sample(place)[1])
            seen.add(sample(place))
        assert len(seen) == length * lanes  # none twice
        left_out.append(frozenset(ALL - seen))
    assert all(not chunks[a] & chunks[b] for a in range(lanes) for b in range(a))
    assert all(len(left) <= (lanes - 1) * COUNTS.max() for left in left_out)
    assert len(set(left_out)) > 1 or not left_out[0]


def test_dealt_lanes_differ_by_at_most_the_largest_chunk() -> None:
    rng = np.random.default_rng(0)
    for lanes in (2, 7, 16):
        counts = rng.integers(1, 1000, 200)
        dealt = deal(counts, lanes, rng)
        assert sorted(np.concatenate(dealt)) == list(range(200))
        sums = [counts[chunks].sum() for chunks in dealt]
        assert max(sums) - min(sums) <= counts.max()
    with pytest.raises(InputError, match=r"data\.lanes=9.*only 8 chunks"):
        order(lanes=9)


@pytest.mark.parametrize("lanes", [1, 2])
def test_sources_mix_by_weight_and_keep_their_own_order(lanes: int) -> None:
    counts = [COUNTS, np.array([20, 20, 20, 20]), np.array([50, 50])]
    mixed = Order(counts, [0.5, 0.3, 0.2], 0, lanes, 3)
    places = [mixed(position) for position in range(3 * BLOCK * lanes)]
    for lane in range(lanes):
        own = [place for place in places if place.lane == lane]
        for start in range(0, len(own), BLOCK):
            assert Counter(place.source for place in own[start : start + BLOCK]) == {0: 500, 1: 300, 2: 200}
        for source in range(3):
            sequence = [sample(place)[1:] for place in own if place.source == source]
            alone = mixed.sources[source]
            for time, (chunk, number) in enumerate(sequence):
                group, offset = alone(lane, time)
                assert (group.chunks[group.chunk[offset]], group.number[offset]) == (chunk, number)
    blocks = [[place.source for place in places[start : start + BLOCK]] for start in (0, BLOCK)]
    assert blocks[0] != blocks[1] and len(set(blocks[0][:20])) > 1
    with pytest.raises(InputError, match="weight of source 2"):
        Order(counts[:2], [1.0, 1e-4], 0, 1, 3)


def test_shares_are_rounded_by_largest_remainder() -> None:
    assert shares([1, 1, 1], 1000).tolist() == [334, 333, 333]
    assert shares([0.5, 0.25, 0.25], 8).tolist() == [4, 2, 2]
    weights = np.random.default_rng(0).random(7)
    assert shares(weights.tolist(), 1000).sum() == 1000
    assert np.abs(shares(weights.tolist(), 1000) - 1000 * weights / weights.sum()).max() < 1


@pytest.mark.parametrize(("lanes", "world_size"), [(1, 1), (1, 4), (4, 2), (4, 4), (8, 2), (2, 4)])
def test_rows_of_all_processes_are_the_batch_sorted_by_lane(lanes: int, world_size: int) -> None:
    start, batch_size = 48, 16
    parts = [rows(start, batch_size, lanes, rank, world_size) for rank in range(world_size)]
    batch = np.concatenate(parts)
    assert all(len(part) == batch_size // world_size for part in parts)
    assert sorted(batch) == list(range(start, start + batch_size))
    assert [position % lanes for position in batch] == [row * lanes // batch_size for row in range(batch_size)]
    assert np.array_equal(batch, rows(start, batch_size, lanes, 0, 1))  # whatever the number of processes
    if lanes % world_size == 0:
        own = [{position % lanes for position in part} for part in parts]
        assert all(not own[a] & own[b] for a in range(world_size) for b in range(a))
