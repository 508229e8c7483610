"""How the benchmarks measure: repeats that take turns, medians with their spread, memory that was allocated, tables."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile


class Spread(NamedTuple):
    """Of several measurements of one thing."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest."""
    return Spread(statistics.median(values), min(values), max(values))


def in_turns(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each of `runs` measured, `repeats` times: A B C A B C …, so that a machine that slows down slows all of them alike."""
    results: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            results[name].append(run())
    return results


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that torch had allocated on the CPU at any time in `function`, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = function()  # held until the profiler has stopped: what it returns counts as allocated
    assert recorded.profiler is not None
    del kept
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of text under their headings, the first column to the left, figures to the right."""
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 132, highlight=False).print(table)
