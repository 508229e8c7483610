"""Towers side by side, from the records that `eval tower` wrote: figures with intervals, and paired differences."""

import itertools
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from clips_core.errors import InputError
from clips_core.folders import MANIFEST, MetricsLog, first_difference, read_json, read_manifest
from eval_suites.comparison import DIRECTIONS, between, p_text, percent, points
from eval_suites.records import Record
from eval_suites.statistics import better_of, holm, mean_score, paired_difference
from eval_suites.terminal import table as terminal_table

STAGE = "eval tower"
# The files of records of each task, with the figure that a record's score is averaged to.
ENDPOINTS = {
    "zero_shot": {"records": "top-1"},
    "probe": {"records": "top-1"},
    "knn": {"records": "top-1"},
    "retrieval": {way: f"R@1 {words}" for way, words in DIRECTIONS.items()},
}
CAVEAT = (
    "Each column is one training: intervals and tests say what other pictures of the same kind could have changed, not what "
    "another training of the same recipe would have."
)


@dataclass(frozen=True)
class Figure:
    """A tower's mean score on a set."""

    set: str
    task: str
    metric: str
    tower: str
    value: float
    interval: tuple[float, float]
    n_samples: int  # pictures, or queries
    n_clusters: int  # pictures
    others: dict[str, float]  # of the same task: top5 and mean_per_class, or R@5 and R@10


@dataclass(frozen=True)
class Difference:
    """Tower a minus tower b on the same pictures; p is Holm's over all rows of the table."""

    set: str
    task: str
    metric: str
    a: str
    b: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    adjusted_p: float
    detectable: float | None  # true difference that so many pictures would have shown four times in five; None: unknown
    inference: str  # checkpoint: each tower is one training
    n_samples: int
    n_seeds: int
    n_clusters: int
    better: str | None  # None: cannot be told


@dataclass(frozen=True)
class TowerTable:
    """What `print_table` shows."""

    towers: dict[str, str]  # spec by name of the folder
    figures: list[Figure]
    differences: list[Difference]
    caveat: str = CAVEAT

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Measured:
    """One tower, set and task, read back."""

    folder: Path
    manifest: dict[str, Any]
    results: dict[str, Any]
    records: dict[str, list[Record]]  # by file


def tower_table(runs: Sequence[Path], sets: Sequence[str] | None = None) -> TowerTable:
    """Figures of each run's tower, and the paired differences of every two on what both were measured on.

    A difference counts as told where its interval leaves out zero and Holm's p is at most 5 %.

    Args:
        runs: folders of towers, as `eval_towers` returns them; their names head the columns.
        sets: only these, in their order; None: all.

    Raises:
        InputError: if a folder is unfinished or malformed, or two towers did not see the same pictures in the same way, naming
            what differs.
    """
    read = {run.name: _read(run, sets) for run in runs}
    if len(read) < len(runs):
        raise InputError(f"two of the runs have the same name: {', '.join(run.name for run in runs)}")
    figures = [figure for name, measured in read.items() for own in measured.values() for figure in _figures(name, own)]
    rows = []
    for a, b in itertools.combinations(read, 2):
        for key in read[a].keys() & read[b].keys():
            rows += [(key, way, a, b) for way in ENDPOINTS[key[1]]]
    places = {(figure.set, figure.task, figure.metric): i for i, figure in reversed(list(enumerate(figures)))}
    rows.sort(key=lambda row: places[*row[0], ENDPOINTS[row[0][1]][row[1]]])
    found = []
    for key, way, a, b in rows:
        one, other = read[a][key], read[b][key]
        _check_same(one, other, way)
        scores, others = ([record.score for record in own.records[way]] for own in (one, other))
        clusters = [record.cluster for record in one.records[way]]
        found.append((key, ENDPOINTS[key[1]][way], a, b, paired_difference(scores, others, clusters)))
    adjusted = holm([row[-1].p_value for row in found]) if found else []
    differences = []
    for ((name, task), metric, a, b, own), p in zip(found, adjusted, strict=True):
        better = better_of(a, b, own.difference, p, own.interval)
        differences.append(
            Difference(
                name, task, metric, a, b, own.difference, own.interval, own.p_value, p, own.detectable, own.inference,
                own.n_samples, own.n_seeds, own.n_clusters, better,
            )
        )  # fmt: skip
    order = sorted(range(len(figures)), key=lambda i: (places[_place(figures[i])], list(read).index(figures[i].tower)))
    specs = {name: next(iter(own.values())).manifest["outputs"]["tower"] for name, own in read.items()}
    return TowerTable(specs, [figures[i] for i in order], differences)


def print_table(table: TowerTable, console: Console) -> None:
    """Towers under letters, their figures by set and task, then the paired differences."""
    letters = dict(zip(table.towers, _letters(), strict=False))
    for name, spec in table.towers.items():
        console.print(f"{letters[name]}  {spec}  ({name})", highlight=False, markup=False, soft_wrap=True)
    rows: dict[tuple[str, str, str], dict[str, Figure]] = {}
    for figure in table.figures:
        rows.setdefault(_place(figure), {})[figure.tower] = figure
    lines = []
    for (name, task, metric), own in rows.items():
        first = next(iter(own.values()))
        cells = [_cell(own.get(tower)) for tower in table.towers]
        lines.append([name, task, metric, str(first.n_samples), *cells])
        for other in first.others:
            cells = [percent(own[tower].others[other]) if tower in own else "–" for tower in table.towers]
            lines.append(["", "", other, "", *cells])
    columns = ["set", "task", "", "n", *letters.values()]
    console.print(terminal_table("Towers in %, with 95 % intervals", columns, lines, words=3))
    if table.differences:
        lines = []
        for row in table.differences:
            difference = f"{points(row.difference)} {between(row.interval)}"
            better = letters[row.better] if row.better else "?"
            cells = [
                f"{letters[row.a]} − {letters[row.b]}",
                difference,
                p_text(row.adjusted_p).removeprefix("= "),
                better,
            ]
            lines.append([row.set, row.task, row.metric, *cells])
        columns = ["set", "task", "", "towers", "difference", "p (Holm)", "better"]
        console.print(terminal_table("Paired differences, in points", columns, lines, words=4))
    console.print(table.caveat, highlight=False, markup=False)


def _letters() -> Iterator[str]:
    """A, B … Z, AA, AB …"""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_uppercase, repeat=length):
            yield "".join(letters)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    return f"{percent(figure.value)} {between(figure.interval, signed=False)}"


def _place(figure: Figure) -> tuple[str, str, str]:
    return figure.set, figure.task, figure.metric


# ------------------------------------------------------------------------------------------------------------ reading


def _read(run: Path, sets: Sequence[str] | None) -> dict[tuple[str, str], _Measured]:
    """What a tower was measured on, by set and task."""
    names = sets if sets is not None else sorted(path.name for path in run.glob("*") if path.is_dir())
    found = {}
    for name in names:
        for task in ENDPOINTS:
            folder = run / name / task
            if (folder / MANIFEST).is_file():
                manifest = read_manifest(folder, STAGE)
                records = {way: _records(folder / f"{way}.jsonl") for way in ENDPOINTS[task]}
                found[name, task] = _Measured(folder, manifest, read_json(folder / "results.json"), records)
    if not found:
        asked = f" of {', '.join(sets)}" if sets else ""
        raise InputError(f"{run}: holds no finished measurement{asked}")
    return found


def _records(path: Path) -> list[Record]:
    validator = TypeAdapter(Record)
    try:
        records = [validator.validate_python(row) for row in MetricsLog(path).rows()]
    except ValueError as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise InputError(f"{path}: malformed ({reason}); delete its folder, and measure again") from None
    if not records:
        raise InputError(f"{path}: holds no record; delete its folder, and measure again")
    return records


def _figures(tower: str, measured: _Measured) -> list[Figure]:
    settings, figures = measured.manifest["config"], []
    for way, metric in ENDPOINTS[settings["task"]].items():
        own = measured.records[way]
        mean = mean_score([record.score for record in own], [record.cluster for record in own])
        if settings["task"] == "retrieval":
            others = {name: measured.results[way][name] for name in ("R@5", "R@10")}
        else:
            wanted = {"top-5": measured.results["top5"], "per class": measured.results["mean_per_class"]}
            others = {name: value for name, value in wanted.items() if value is not None}
        figures.append(
            Figure(
                settings["set"], settings["task"], metric, tower, mean.value, mean.interval, mean.n_samples,
                mean.n_clusters, others,
            )
        )  # fmt: skip
    return figures


def _check_same(a: _Measured, b: _Measured, way: str) -> None:
    """Raise an `InputError`, naming what differs first, unless two towers saw the same pictures in the same way."""

    def seen(own: _Measured) -> dict[str, Any]:
        inputs = {key: value for key, value in own.manifest["inputs"].items() if key != "tower"}
        return {**own.manifest["config"], "inputs": inputs, "pictures": own.manifest["outputs"]["content"]}

    difference = first_difference(seen(a), seen(b))
    if difference is not None:
        raise InputError(f"{a.folder} and {b.folder} were not measured in the same way ({difference})")
    for one, other in itertools.zip_longest(a.records[way], b.records[way]):
        key = [None if own is None else (own.doc_id, own.cluster, own.question, own.target) for own in (one, other)]
        if key[0] != key[1]:
            raise InputError(f"{a.folder} and {b.folder} hold different records in {way}.jsonl: {key[0]} and {key[1]}")
