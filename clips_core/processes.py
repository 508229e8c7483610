"""Work spread over processes: results in order, a bounded number under way, nobody left behind by a kill."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from clips_core.errors import InputError

Shared = TypeVar("Shared")
In = TypeVar("In")
Out = TypeVar("Out")


def ordered_map(
    workers: int, function: Callable[[Shared, In], Out], shared: Shared, items: Sequence[In]
) -> Iterator[Out]:
    """`function(shared, item)` of each item, in their order, at most two items per worker under way.

    Args:
        workers: processes; 1: this one.
        function: a function of a module.
        shared: what all items need; a worker gets it once.

    Raises:
        InputError: if a worker dies, which is nearly always the operating system's doing when memory runs out.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        for item in items:
            yield function(shared, item)
        return
    # spawn: a forked child could inherit a lock that a thread of this process holds.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (function, shared))
    under_way: collections.deque[Future[Any]] = collections.deque()
    try:
        for item in items:
            under_way.append(pool.submit(_call, item))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, most likely because memory ran out; run the same command with fewer workers "
            "to go on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_of_this_worker: list[Any] = []  # function, shared


def _call(item: Any) -> Any:
    function, shared = _of_this_worker
    return function(shared, item)


def _start_worker(function: Any, shared: Any) -> None:
    """Ctrl-C is for the parent to handle; and when the parent is killed, its workers end too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _of_this_worker[:] = [function, shared]
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
