"""`clips-llava study captions`: does a shorter text make a better tower? The paper's inverse effect, measured.

A grid of pretrainings that differ in nothing but what the text encoder reads of a caption: synthetic captions, shortened by each
strategy to each length, and web captions beside them. All points see the same pictures in the same order, with the same schedule,
the same first weights (of one seed) and the same FLOPs, since a short text is padded to the same context. What is compared is
zero-shot retrieval among held-out pictures, *whose texts are always whole*, as in the paper: how long the texts were in training is
the only thing that changes.

Under `out` there are one run folder a point (`points/`, each as `clips-llava pretrain` leaves it), study.json, the figure as
captions.svg and captions.png, and captions.html, all of them written anew after every point. Under `results`: one JSON a finished
point; a point whose file is there is not trained again (`eval_suites.results`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic.dataclasses import dataclass
from rich.console import Console

from clips_core.config import FORBID, PretrainConfig, Strategy, to_dict
from clips_core.errors import InputError
from clips_core.folders import claimed, first_difference, write_bytes, write_json
from clips_core.recaption import parse_part
from eval_suites import study_page
from eval_suites.comparison import between, percent
from eval_suites.grid import is_finished, point_config, train_points
from eval_suites.results import make_result, read_result, write_result
from eval_suites.study_curves import LABELS, MEASURES, Study, analyse, tokens
from eval_suites.terminal import table

# Keys of a pretraining that the study sets itself, and where to say so instead.
OWN_KEYS = {
    "out": "each point has a folder under the study's own `out`",
    "method": "every point is trained with the method clip, one text a picture",
    "texts": "say it in strategies, lengths and sources",
    "seed": "say it in seeds",
}


@dataclass(config=FORBID)
class CaptionStudyConfig:
    """The grid, and the pretraining that is the same at all of its points."""

    out: Path  # the study's folder; several processes may share it
    # Keys of `clips-llava pretrain` (pretrain.samples=…, pretrain.data.train=…), laid over the recipes that pretrain.recipe
    # names, if any. The caption decoder is left out: the method is clip.
    pretrain: dict[str, Any]
    sources: list[Literal["synthetic", "web"]] = dataclasses.field(default_factory=lambda: ["synthetic", "web"])
    strategies: list[Strategy] = dataclasses.field(
        default_factory=lambda: ["truncation", "random_mask", "block_mask", "sub_caption"]
    )  # of synthetic captions
    lengths: list[int] = dataclasses.field(default_factory=lambda: [8, 16, 32, 64])  # tokens without bos, eos, CLS
    web_strategies: list[Literal["truncation", "random_mask", "block_mask"]] = dataclasses.field(
        default_factory=lambda: ["truncation"]
    )
    web_lengths: list[int] | None = None  # null: the same lengths. Web captions are short: so should these be
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])  # trainings of each point
    results: Path | None = None  # folder of the JSON files, one a training; null: OUT/results
    part: str | None = None  # i/n: only points i, i + n, … of the grid; null: all

    def __post_init__(self) -> None:
        for name in ("sources", "strategies", "lengths", "web_strategies", "web_lengths", "seeds"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"{name} must name at least one, and each once")
        if min([*self.lengths, *(self.web_lengths or [])]) < 1:
            raise ValueError("lengths and web_lengths must be at least 1")
        if self.part is not None:
            parse_part(self.part)


class Point(NamedTuple):
    """One training of the grid."""

    source: str  # synthetic or web
    strategy: str
    length: int  # body tokens
    seed: int

    @property
    def name(self) -> str:
        return f"{self.source}-{self.strategy}-{self.length}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.source} captions, {LABELS[self.strategy]}, {tokens(self.length)}, seed {self.seed}"


def study_captions(config: CaptionStudyConfig) -> Path:
    """Train every point of this process's part that is not finished, and draw what is known.

    Run again after an interruption, it goes on: finished points are not repeated, and the one that was interrupted goes on from its
    last checkpoint. Several processes may share `out`: a point that another one is training is passed over. Under torchrun,
    all processes of a launch train each point together.

    Returns:
        `config.out`.

    Raises:
        InputError: before the first training, if a point's settings are wrong, a length does not fit the text encoder, there is
            nothing to evaluate on, or `out` holds a study with other settings; later, as `clips_core.train.pretrain`.
    """
    grid = points(config)
    runs = {point: pretrain_config(config, point) for point in grid}
    _check_lengths(grid, runs)

    def conclude() -> None:
        study = publish(config, runs)
        if study is not None:
            print_study(study, Console())
        print(f"\n{_standing(config, runs)}")

    train_points(
        config.out,
        runs,
        config.part,
        is_done=lambda point: read_result(_results(config), point, runs[point]) is not None,
        before=lambda: publish(config, runs),
        after_each=lambda: publish(config, runs),
        after_all=conclude,
    )
    return config.out


# --- the grid -------------------------------------------------------------------------------------------------------


def points(config: CaptionStudyConfig) -> list[Point]:
    """Every training, in the order in which they are done: a whole picture with the first seed, then the next seed."""
    kinds: list[tuple[str, Sequence[str], list[int]]] = []
    if "synthetic" in config.sources:
        kinds.append(("synthetic", config.strategies, config.lengths))
    if "web" in config.sources:
        kinds.append(("web", config.web_strategies, config.web_lengths or config.lengths))
    return [
        Point(source, strategy, length, seed)
        for seed in config.seeds
        for source, strategies, lengths in kinds
        for strategy in strategies
        for length in sorted(lengths)
    ]


def pretrain_config(config: CaptionStudyConfig, point: Point) -> PretrainConfig:
    """The pretraining of one point.

    Raises:
        InputError: if `pretrain` has an unknown or wrong key, or one that the study sets itself.
    """
    own = {
        "out": str(config.out / "points" / point.name),
        "method": "clip",
        "model": {"decoder": None},
        "texts": {"source": point.source, "strategy": point.strategy, "length": point.length},
        "seed": point.seed,
    }
    return point_config(config.pretrain, own, OWN_KEYS)


def _check_lengths(grid: Sequence[Point], runs: dict[Point, PretrainConfig]) -> None:
    run = runs[grid[0]]
    longest = max(point.length for point in grid)
    if longest + 3 > run.model.context_length:
        raise InputError(
            f"lengths: {longest} tokens need pretrain.model.context_length of at least {longest + 3} (bos, eos and CLS come "
            f"with them), and it is {run.model.context_length}"
        )
    if run.evaluation.shards is None:
        raise InputError(
            "pretrain.evaluation.shards: name the held-out pictures; they are what the points are compared on"
        )


# --- the folder -----------------------------------------------------------------------------------------------------


def _results(config: CaptionStudyConfig) -> Path:
    return config.results or config.out / "results"


def publish(config: CaptionStudyConfig, runs: dict[Point, PretrainConfig]) -> Study | None:
    """Keep the results of points that have finished; from all results write study.json, the figure and the page. None if none is.

    Raises:
        InputError: if two points were trained or evaluated on different data, or one with other settings.
    """
    with claimed(config.out, wait=True):  # so that no process writes what it read before another one's last point
        rows = []
        for point, run in runs.items():
            row = read_result(_results(config), point, run)
            if row is None and is_finished(run):
                row = make_result(point, run)
                write_result(_results(config), row)
            if row is not None:
                rows.append(row)
        if not rows:
            return None
        for row in rows:
            for key in ("inputs", "n", "captions"):
                difference = first_difference(rows[0][key], row[key], key)
                if difference is not None:
                    names = f"{rows[0]['point']} and {row['point']}"
                    raise InputError(
                        f"{_results(config)}: {names} saw different data ({difference}); delete the one that is out of date, and "
                        "its folder under points"
                    )
        study = analyse(rows, to_dict(config), len(runs))
        write_json(config.out / "study.json", study.to_dict())
        for kind in ("svg", "png"):
            write_bytes(config.out / f"captions.{kind}", study_page.figure(study, kind))
        write_bytes(config.out / "captions.html", study_page.render(study).encode())
    return study


# --- what is said of it ---------------------------------------------------------------------------------------------


def _standing(config: CaptionStudyConfig, runs: dict[Point, PretrainConfig]) -> str:
    missing = [point for point, run in runs.items() if read_result(_results(config), point, run) is None]
    if not missing:
        return f"All {len(runs)} points are finished. The page: {config.out / 'captions.html'}"
    return (
        f"{len(missing)} of {len(runs)} points are not finished (the first: {missing[0]}): other parts or processes have them, or "
        "run the same command again"
    )


def print_study(study: Study, console: Console) -> None:
    """All points as a table, then the findings."""
    several = any(point.trainings > 1 for curve in study.curves for point in curve.points)
    columns = ["captions", "strategy", "tokens", "R@1", "95 % interval", "→ caption", "→ picture"]
    rows = []
    for row in study.table():
        mean, ways = row["mean"], [percent(row[way].value) for way in MEASURES if way != "mean"]
        cells = [mean.source, LABELS[mean.strategy], str(mean.length), percent(mean.value)]
        cells += [between(mean.interval, signed=False), *ways, *([str(mean.trainings)] if several else [])]
        rows.append(cells)
    title = "R@1 among held-out pictures in %, mean of both ways and each"
    console.print(table(title, [*columns, *(["trainings"] if several else [])], rows, words=2))
    for sentence in study.findings:
        console.print(f"• {sentence}", highlight=False, markup=False)
