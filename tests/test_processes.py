"""Work over real processes."""

import os
import time

import pytest

from clips_core.errors import InputError
from clips_core.processes import ordered_map


def slow_first(shared: int, item: int) -> tuple[int, int]:
    time.sleep(0.3 if item == 0 else 0)
    return shared + item, os.getpid()


def fails_at(bad: int, item: int) -> int:
    if item == bad:
        raise InputError(f"item {item} is bad")
    return item


def dies_at(bad: int, item: int) -> int:
    if item == bad:
        os.kill(os.getpid(), 9)
    return item


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    results = list(ordered_map(workers, slow_first, 100, range(20)))
    assert [value for value, _ in results] == list(range(100, 120))
    pids = {pid for _, pid in results}
    assert pids == {os.getpid()} if workers == 1 else len(pids) == 2 and os.getpid() not in pids
    assert list(ordered_map(workers, slow_first, 100, [])) == []


def test_an_error_arrives_as_it_was_raised() -> None:
    results = ordered_map(2, fails_at, 3, range(1000))
    with pytest.raises(InputError, match=r"^item 3 is bad$"):
        list(results)


def test_a_worker_that_dies_is_one_clear_error() -> None:
    with pytest.raises(InputError, match=r"a worker process was killed, .* fewer workers"):
        list(ordered_map(2, dies_at, 5, range(20)))
