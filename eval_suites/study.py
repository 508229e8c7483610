"""`clips-llava study captions`: does a shorter text make a better tower? The paper's inverse effect, measured.

A grid of pretrainings that differ in nothing but what the text encoder reads of a caption: synthetic captions, shortened by each
strategy to each length, and web captions beside them. All points see the same pictures in the same order, with the same schedule,
the same first weights (of one seed) and the same FLOPs, since a short text is padded to the same context. What is compared is
zero-shot retrieval among held-out pictures, *whose texts are always whole*, as in the paper: how long the texts were in training is
the only thing that changes.

Under `out` there are one run folder a point (`points/`, each as `clips-llava pretrain` leaves it), results.jsonl (one line a
finished point), study.json, the figure as captions.svg and captions.png, and captions.html. All are written anew after every point.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass
from rich.console import Console

from clips_core.config import FORBID, PretrainConfig, Strategy, to_dict, what_trains
from clips_core.errors import InputError
from clips_core.folders import MANIFEST, claimed, first_difference, read_json, read_manifest, write_bytes, write_json
from clips_core.recaption import parse_part
from eval_suites import study_page
from eval_suites.comparison import between, percent, query_pictures
from eval_suites.grid import is_finished, point_config, train_points
from eval_suites.study_curves import LABELS, MEASURES, Result, Study, analyse, scores_by_picture, tokens
from eval_suites.terminal import table

SETTINGS = "settings.json"  # of a study's folder: what all of its points have in common
WEIGHTS = "export/open_clip/open_clip_model.safetensors"
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
        is_done=lambda point: is_finished(runs[point]),
        before=lambda: _agree_on_settings(config, runs[grid[0]]),
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


def _agree_on_settings(config: CaptionStudyConfig, run: PretrainConfig) -> None:
    """Write down what all points have in common, or compare with what an earlier run or another process has written.

    What changes only how a point is trained, and not what comes out, may differ from process to process.
    """
    settings = {name: value for name, value in what_trains(run).items() if name not in ("texts", "seed")}
    with claimed(config.out, wait=True):
        path = config.out / SETTINGS
        if not path.exists():
            if (config.out / "points").exists():
                raise InputError(f"{config.out}: has points but no {SETTINGS}; choose another folder")
            write_json(path, settings)
        difference = first_difference(read_json(path), settings)
    if difference is not None:
        raise InputError(
            f"{config.out} holds a study with other settings (pretrain.{difference}); choose another out or delete it"
        )


def read_row(point: Point, run: PretrainConfig) -> dict[str, Any]:
    """The line of results.jsonl of a finished point.

    Raises:
        InputError: if its folder is another stage's, or holds no evaluation.
    """
    manifest, zero_shot = read_manifest(run.out, "pretrain"), read_json(run.out / "zero_shot.json")
    outputs = manifest["outputs"]
    return {
        "point": point.name,
        **point._asdict(),
        **{way: zero_shot[way] for way in ("image_to_text", "text_to_image")},
        "mean": {k: (zero_shot["image_to_text"][k] + zero_shot["text_to_image"][k]) / 2 for k in zero_shot["chance"]},
        **{name: zero_shot[name] for name in ("chance", "n", "captions")},
        **{name: outputs[name] for name in ("samples", "processes", "parameters", "flops_per_sample", "seconds")},
        "flops": outputs["flops_per_sample"] * outputs["samples"],
        "weights": manifest["weights"][WEIGHTS],
        "inputs": manifest["inputs"],
        "finished": manifest["finished"],
        "folder": str(run.out),
    }


def publish(config: CaptionStudyConfig, runs: dict[Point, PretrainConfig]) -> Study | None:
    """Write results.jsonl, study.json, the figure and the page from the points that are finished; None if none is.

    Raises:
        InputError: if two points were trained or evaluated on different data.
    """
    with claimed(config.out, wait=True):  # so that no process writes what it read before another one's last point
        finished = {point: run for point, run in runs.items() if is_finished(run)}
        rows = [read_row(point, run) for point, run in finished.items()]
        if not rows:
            return None
        for row in rows:
            for key in ("inputs", "n", "captions"):
                difference = first_difference(rows[0][key], row[key], key)
                if difference is not None:
                    names = f"{rows[0]['folder']} and {row['folder']}"
                    raise InputError(f"{names} saw different data ({difference}); delete the one that is out of date")
        results = [Result(row, read_scores(run)) for row, run in zip(rows, finished.values(), strict=True)]
        write_bytes(config.out / "results.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        study = analyse(results, to_dict(config), read_json(config.out / SETTINGS), len(runs))
        write_json(config.out / "study.json", study.to_dict())
        for kind in ("svg", "png"):
            write_bytes(config.out / f"captions.{kind}", study_page.figure(study, kind))
        write_bytes(config.out / "captions.html", study_page.render(study).encode())
    return study


def read_scores(run: PretrainConfig) -> dict[str, NDArray[np.float64]]:
    """R@1 of every held-out picture by measure, [N], as a finished training evaluated itself.

    Raises:
        InputError: if it holds no evaluation, or one that does not say whose each of several captions is.
    """
    path = run.out / "zero_shot.json"
    zero_shot = read_json(path)
    owner = query_pictures(zero_shot, "text_to_image")
    if owner is None:
        raise InputError(
            f"{path}: lacks `owner`, which says whose each of its {zero_shot['captions']} captions is; delete {MANIFEST} beside "
            "it and run the same command to evaluate again"
        )
    return scores_by_picture(zero_shot["ranks"], np.array(owner))


# --- what is said of it ---------------------------------------------------------------------------------------------


def _standing(config: CaptionStudyConfig, runs: dict[Point, PretrainConfig]) -> str:
    missing = [point for point, run in runs.items() if not is_finished(run)]
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
    console.print(table(title, [*columns, *(["trainings"] if several else [])], rows, words=2, no_wrap=True))
    for sentence in study.findings:
        console.print(f"• {sentence}", highlight=False, markup=False)
