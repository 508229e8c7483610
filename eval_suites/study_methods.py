"""`clips-llava study methods`: which way of pretraining makes the better tower, at equal pictures and at equal FLOPs?

Arms differ in the method; grids say which of them are trained how often, on which data, and under which budget: as many pictures as
the others, or as many as the same FLOPs pay for. Trainings of one seed start from the same weights where the arms have the same
parts, and see the same pictures in the same order for as long as both go on.

Under `out`: points/NAME/, as `clips-llava pretrain` leaves them, methods.json, methods.md and the figure. Under `results`: one
small JSON a training, with all that the tables are made of, picture by picture. Where such a file is there, the training is not
run again: the folder can be kept under version control, and a study be spread over days and machines. With `classes`, a result
without a classification gets one as long as the training's folder is there.
"""

import contextlib
import dataclasses
import io
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from clips_core.config import FORBID, PretrainConfig, to_dict
from clips_core.errors import InputError
from clips_core.folders import (
    MetricsLog,
    environment,
    first_difference,
    read_json,
    read_manifest,
    write_bytes,
    write_json,
)
from clips_core.recaption import parse_part
from eval_suites.comparison import DIRECTIONS, between, p_text, percent, points
from eval_suites.grid import is_finished, point_config, train_points
from eval_suites.methods_page import BUDGETS, figure
from eval_suites.page import duration
from eval_suites.results import WEIGHTS, make_result, read_result, write_result
from eval_suites.statistics import Difference, Mean, holm, mean_score, paired_difference
from eval_suites.towers.config import ClassSet, TowerEvalConfig

OWN_KEYS = {
    "out": "each training has a folder under the study's own `out`",
    "method": "say it in the arms",
    "seed": "say it in the grids",
}

Budget = Literal["pictures", "flops"]


@dataclass(config=FORBID)
class GridConfig:
    """Every arm of `arms` on every data of `data`, under every budget, with every seed."""

    arms: list[str]
    seeds: list[int]
    budgets: list[Budget] = dataclasses.field(default_factory=lambda: ["pictures"])
    data: list[str] = dataclasses.field(
        default_factory=lambda: ["own"]
    )  # names in the study's `data`; own: as `pretrain` has it


@dataclass(config=FORBID)
class MethodStudyConfig:
    """Arms and grids, and the pretraining that they are laid over."""

    out: Path  # the study's folder; several processes may share it
    pretrain: dict[str, Any]  # keys of `clips-llava pretrain`; `recipe` names the recipes below them
    arms: dict[str, dict[str, Any]]  # by name: keys laid over `pretrain`, method among them
    grids: list[GridConfig]
    baseline: str  # the arm that every other one is compared with
    flops_of: str  # the arm whose FLOPs, at pretrain.samples pictures, every arm gets under the budget `flops`
    data: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by name: keys laid over `pretrain`
    classes: ClassSet | None = None  # a set for zero-shot classification, as of `clips-llava eval tower`; null: none
    results: Path | None = None  # folder of the JSON files, one a training; null: OUT/results
    part: str | None = None  # i/n: only trainings i, i + n, … of the study; null: all

    def __post_init__(self) -> None:
        for name in (self.baseline, self.flops_of, *(arm for grid in self.grids for arm in grid.arms)):
            if name not in self.arms:
                raise ValueError(f"no arm is called {name!r}; the arms are {', '.join(self.arms)}")
        for name in (name for grid in self.grids for name in grid.data):
            if name != "own" and name not in self.data:
                raise ValueError(f"no data is called {name!r}; besides own there are {', '.join(self.data) or 'none'}")
        if self.classes is not None and self.classes.tasks != ["zero_shot"]:
            raise ValueError("classes.tasks must be [zero_shot], which is all that the study compares")
        if self.part is not None:
            parse_part(self.part)


class Point(NamedTuple):
    """One training."""

    arm: str
    budget: Budget
    data: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.budget}-{self.data}-seed{self.seed}"

    def __str__(self) -> str:
        data = "" if self.data == "own" else f", data {self.data}"
        return f"{self.arm}, equal {BUDGETS[self.budget]}{data}, seed {self.seed}"


def study_methods(config: MethodStudyConfig) -> Path:
    """Do every training of this process's part that has no result, complete the results, and write down what is known.

    Returns:
        `config.out`.

    Raises:
        InputError: before the first training, if an arm's settings are wrong, there is nothing to evaluate on, or a result was made
            with other settings; later, as `clips_core.train.pretrain`.
    """
    base = {arm: _config(config, Point(arm, "pictures", "own", 0)) for arm in config.arms}
    for run in base.values():
        if run.evaluation.shards is None:
            raise InputError("pretrain.evaluation.shards: name the held-out pictures that the arms are compared on")
    results = config.results or config.out / "results"
    samples = _samples(config, base, results)
    runs = {}
    for point in training_order(config):
        run = _config(config, point)
        runs[point] = dataclasses.replace(run, samples=samples[point.arm]) if point.budget == "flops" else run

    def kept(point: Point) -> dict[str, Any] | None:
        return read_result(results, point, runs[point])

    def write_results() -> None:
        for point, run in tqdm(runs.items(), desc="results", unit="training", delay=3):
            old, trained = kept(point), is_finished(run)
            row = make_result(point, run) if old is None and trained else old
            if row is None:
                continue
            if config.classes is not None and trained and "classification" not in row and _is_of(row, run):
                row = {**row, "classification": classify(run, config.classes)}
            if row is not old:
                write_result(results, row)

    def begin() -> None:
        if config.classes is not None and any(kept(point) is None for point in runs):  # before hours of training
            from eval_suites.towers.sets import read_class_set

            read_class_set("classes", config.classes, Path())
        write_results()

    def conclude() -> None:
        write_results()
        done = [row for point in runs if (row := kept(point)) is not None]
        if done:
            study = analyse(done, config.baseline, config.flops_of)
            write_json(config.out / "methods.json", {"config": to_dict(config), **study, "environment": environment()})
            write_bytes(config.out / "methods.md", tables(study).encode())
            for kind in ("svg", "png"):
                write_bytes(config.out / f"methods.{kind}", figure(study, kind))
            print(
                f"\n{tables(study)}\n{len(done)} of {len(runs)} trainings are done. The tables: {config.out / 'methods.md'}"
            )

    train_points(config.out, runs, config.part, lambda point: kept(point) is not None, begin, write_results, conclude)
    return config.out


# --- the grid -------------------------------------------------------------------------------------------------------


def training_order(config: MethodStudyConfig) -> list[Point]:
    """Every training once: all first seeds, then all second ones, so that an unfinished study is a smaller whole one.

    The arm whose FLOPs are everybody's has one training for both budgets.
    """
    found = {
        Point(arm, "pictures" if arm == config.flops_of else budget, data, seed)
        for grid in config.grids
        for arm, budget, data, seed in itertools.product(grid.arms, grid.budgets, grid.data, grid.seeds)
    }
    arms, data = list(config.arms), ["own", *config.data]
    return sorted(found, key=lambda p: (p.seed, data.index(p.data), p.budget == "flops", arms.index(p.arm)))


def _config(config: MethodStudyConfig, point: Point) -> PretrainConfig:
    own: dict[str, Any] = {}
    for layer in (config.data.get(point.data, {}), config.arms[point.arm]):
        _lay_over(own, layer)
    own |= {"out": str(config.out / "points" / point.name), "seed": point.seed}
    return point_config(config.pretrain, own, OWN_KEYS)


def _lay_over(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _lay_over(values[key], value)
        else:
            values[key] = dict(value) if isinstance(value, Mapping) else value


def _samples(config: MethodStudyConfig, base: Mapping[str, PretrainConfig], results: Path) -> dict[str, int]:
    """By arm, how many pictures the FLOPs of `flops_of` pay for: whole batches, counted as training counts its FLOPs."""
    if not any("flops" in grid.budgets for grid in config.grids):
        return {}
    cost = {}
    for arm, run in base.items():
        # As the result has it, where there is one: so the tables can be made of results alone, where no data is.
        row = read_result(results, Point(arm, "pictures", "own", 0), run)
        cost[arm] = _flops_per_sample(run) if row is None else row["flops_per_sample"]
    paid = base[config.flops_of].samples * cost[config.flops_of]
    return {arm: max(1, round(paid / cost[arm] / run.batch_size)) * run.batch_size for arm, run in base.items()}


def _flops_per_sample(run: PretrainConfig) -> float:
    from clips_core.model import CLIPS
    from clips_core.train import flops_per_sample, open_data

    _, dataset = open_data(run)
    return flops_per_sample(CLIPS(run.model), dataset, run)


# --- classification -------------------------------------------------------------------------------------------------


def _is_of(row: Mapping[str, Any], run: PretrainConfig) -> bool:
    """Whether a result is that of this folder's training: the same training done twice may give two towers."""
    return bool(read_manifest(run.out, "pretrain")["weights"][WEIGHTS] == row["weights"])


def classify(run: PretrainConfig, classes: ClassSet) -> dict[str, Any]:
    """Zero-shot classification by a finished training's tower, as `clips-llava eval tower` does it.

    Returns:
        top1; n_classes to choose from; `classes`, those that have pictures; of every picture `labels`, its class's place among
        them, and `scores`, 1 where it was told; and hashes of the `pictures` and `prompts`.
    """
    from eval_suites.towers.run import eval_towers

    with tempfile.TemporaryDirectory() as folder:
        settings = TowerEvalConfig(towers=[f"clips:{run.out}"], out=Path(folder), classes={"classes": classes})
        with contextlib.redirect_stdout(io.StringIO()):  # its table has one tower; the study's has all
            [tower] = eval_towers(settings)
        place = tower / "classes" / "zero_shot"
        rows = MetricsLog(place / "records.jsonl").rows()
        manifest, figures = read_manifest(place), read_json(place / "results.json")
    names = list(figures["per_class"])
    return {
        "top1": figures["top1"],
        "n_classes": figures["classes"],
        "pictures": manifest["outputs"]["content"]["test"],
        "prompts": manifest["inputs"]["prompts"],
        "classes": names,
        "labels": [names.index(row["category"]) for row in rows],
        "scores": [int(row["score"]) for row in rows],
    }


# --- all results ----------------------------------------------------------------------------------------------------


def analyse(results: Sequence[Mapping[str, Any]], baseline: str, flops_of: str) -> dict[str, Any]:
    """R@1 and top-1 of each arm with intervals over trainings and pictures, and paired differences to the baseline.

    A difference takes the seeds that both have. Holm's adjustment is over all differences of one budget, data and measure: they
    are secondary to none, so every one must stand for itself. Each picture is a cluster; classes are fixed, as those of the set.

    Raises:
        InputError: if two trainings were classified on different sets.
    """
    _check_same_set(results)
    rows: list[dict[str, Any]] = []
    for (budget, data), group in _conditions(results, flops_of):
        by_arm = {arm: _by_seed(group, arm) for arm in dict.fromkeys(row["arm"] for row in group)}
        recalls = _compare({arm: {s: hits(row) for s, row in own.items()} for arm, own in by_arm.items()}, baseline)
        top1 = _compare({arm: _classified(own) for arm, own in by_arm.items()}, baseline)
        for arm, by_seed in by_arm.items():
            row = {
                "budget": budget, "data": data, "arm": arm, "seeds": list(by_seed),
                "samples": next(iter(by_seed.values()))["samples"],
                "flops": float(np.mean([own["samples"] * own["flops_per_sample"] for own in by_seed.values()])),
                "seconds": float(np.mean([own["seconds"] for own in by_seed.values()])),
                "recall": recalls[arm]["mean"],
                **{way: float(np.mean([own[way]["R@1"] for own in by_seed.values()])) for way in DIRECTIONS},
                "difference": recalls[arm]["difference"],
                "top1": top1[arm]["mean"],
                "top1_difference": top1[arm]["difference"],
            }  # fmt: skip
            rows.append(row)
    n_classes = next((row["classification"]["n_classes"] for row in results if "classification" in row), None)
    return {"baseline": baseline, "n_classes": n_classes, "rows": rows}


def _compare(scores: Mapping[str, Mapping[int, NDArray[np.float64]]], baseline: str) -> dict[str, dict[str, Any]]:
    """Of each arm `mean`, as `mean_score`, and `difference` to the baseline, as `paired_difference`, with Holm's `adjusted_p`.

    Args:
        scores: by arm and seed, of the same pictures, [N].

    Returns:
        Both are None where nothing is known: of an arm without scores, or without a seed that the baseline has too.
    """
    found: dict[str, dict[str, Any]] = {arm: {"mean": None, "difference": None} for arm in scores}
    compared: dict[str, Difference] = {}
    for arm, by_seed in scores.items():
        if by_seed:
            values = np.stack(list(by_seed.values()))
            found[arm]["mean"] = dataclasses.asdict(mean_score(values, range(values.shape[-1])))
        shared = sorted(set(by_seed) & set(scores.get(baseline, {})))
        if arm != baseline and shared:
            a, b = (np.stack([scores[name][seed] for seed in shared]) for name in (arm, baseline))
            compared[arm] = paired_difference(a, b, range(a.shape[-1]))
    adjusted = holm([difference.p_value for difference in compared.values()])
    for (arm, difference), p_value in zip(compared.items(), adjusted, strict=True):
        found[arm]["difference"] = {**dataclasses.asdict(difference), "adjusted_p": p_value}
    return found


def _check_same_set(results: Sequence[Mapping[str, Any]]) -> None:
    known = [row for row in results if "classification" in row]
    for row in known:
        for key in ("pictures", "prompts"):
            difference = first_difference(known[0]["classification"][key], row["classification"][key], key)
            if difference is not None:
                raise InputError(
                    f"{known[0]['point']} and {row['point']} were classified on different sets ({difference}); delete the result "
                    "that is out of date: it is written again from its training's folder"
                )


def _classified(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[int, NDArray[np.float64]]:
    """By seed, whether each picture's class was told, [N]; only of trainings that have it."""
    return {
        seed: np.array(row["classification"]["scores"], dtype=float)
        for seed, row in by_seed.items()
        if "classification" in row
    }


def _conditions(
    results: Sequence[Mapping[str, Any]], flops_of: str
) -> Iterator[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    """Results by budget and data. The arm whose FLOPs are everybody's stands under both budgets: it was trained once for them."""
    for budget, data in dict.fromkeys((row["budget"], row["data"]) for row in results):
        yield (
            (budget, data),
            [row for row in results if row["data"] == data and (row["budget"] == budget or row["arm"] == flops_of)],
        )


def _by_seed(group: Sequence[Mapping[str, Any]], arm: str) -> dict[int, Mapping[str, Any]]:
    return {row["seed"]: row for row in sorted(group, key=lambda row: row["seed"]) if row["arm"] == arm}


def hits(row: Mapping[str, Any]) -> NDArray[np.float64]:
    """R@1 of every held-out picture, mean of both ways, [N]."""
    return np.mean([row["scores"][way] for way in DIRECTIONS], axis=0)


COLUMNS = ("arm", "trainings", "pictures seen", "PFLOP", "time", "R@1, mean of both ways", "→ caption", "→ picture")


def tables(study: Mapping[str, Any]) -> str:
    """Markdown: a table for each budget and data."""
    head = [*COLUMNS, f"− {study['baseline']}"]
    if study["n_classes"] is not None:
        head += [f"top-1 of {study['n_classes']} classes", f"− {study['baseline']}"]
    parts = []
    for (budget, data), group in itertools.groupby(study["rows"], lambda row: (row["budget"], row["data"])):
        rows = [head, ["---"] * len(head), *(_cells(row)[: len(head)] for row in group)]
        title = f"Equal {BUDGETS[budget]}{'' if data == 'own' else f', data {data}'}:"
        parts.append("\n".join([title, "", *(f"| {' | '.join(cells)} |" for cells in rows)]))
    return "\n\n".join(parts) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    trainings = len(row["seeds"])
    return [
        row["arm"],
        str(trainings),
        f"{row['samples']:,}",
        f"{row['flops'] / 1e15:.3g}",
        duration(row["seconds"]),
        _mean_cell(row["recall"], trainings),
        *(f"{percent(row[way])} %" for way in DIRECTIONS),
        _difference_cell(row["difference"]),
        _mean_cell(row["top1"], trainings),
        _difference_cell(row["top1_difference"]),
    ]


def _mean_cell(found: Mapping[str, Any] | None, trainings: int) -> str:
    """A mean and its interval, and of how many trainings it is where that is not all."""
    if found is None:
        return ""
    mean = Mean(**found)
    fewer = "" if mean.n_seeds == trainings else f" (of {mean.n_seeds})"
    return f"{percent(mean.value)} % {between(mean.interval, signed=False)}{fewer}"


def _difference_cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{points(found['difference'])} {between(found['interval'])}, p {p_text(found['adjusted_p'])}"
