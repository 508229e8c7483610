"""From the points of a caption study to curves with intervals, trends and sentences.

Two uncertainties are kept apart. Of *one training a point* the intervals speak of the held-out pictures: had others been drawn, how
far would R@1 have moved? (Wilson's over pictures, see `eval_suites.statistics`.) What another training would have given they do not
know, and the sentences say so. Of *several trainings a point* they are t-intervals over the trainings, on these held-out pictures.

The effect itself is one figure a curve, the *trend*: the least-squares slope of R@1 over log2 of the length, that is how much
each doubling of the text is worth. It uses all points and was not chosen by looking at them. Points of one curve are compared on
the same pictures (or with the same seed), so the slope is taken picture by picture (or training by training) and then averaged.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from clips_core.folders import environment
from eval_suites.comparison import DIRECTIONS, between, percent, points
from eval_suites.statistics import CONFIDENCE, mean_score, paired_difference

MEASURES = {"mean": "mean of both ways", "image_to_text": "picture → caption", "text_to_image": "caption → picture"}
LABELS = {
    "truncation": "truncation",
    "random_mask": "random mask",
    "block_mask": "block mask",
    "sub_caption": "sub-caption",
}
Scores = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """R@1 of one point of a curve, with its 95 % interval."""

    source: str
    strategy: str
    measure: str
    length: int
    value: float
    interval: Interval
    trainings: int  # 1: the interval is over pictures; more: over trainings


@dataclass(frozen=True)
class Trend:
    """What one doubling of the length adds to R@1, with its 95 % interval."""

    value: float
    interval: Interval
    trainings: int  # as in Estimate

    @property
    def verdict(self) -> str:
        if self.interval[1] < 0:
            return "falls"
        return "rises" if self.interval[0] > 0 else "shows no clear trend"


@dataclass(frozen=True)
class Curve:
    """R@1 against length, of one source and strategy."""

    source: str
    strategy: str
    measure: str
    points: list[Estimate]  # sorted by length
    trend: Trend | None  # None: fewer than two lengths


@dataclass(frozen=True)
class Study:
    """What study.json holds."""

    config: dict[str, Any]
    settings: dict[str, Any]  # of pretraining, the same at all points
    points: list[dict[str, Any]]  # the results, without their scores picture by picture
    of: int  # points in the whole grid
    curves: list[Curve]
    chance: float  # R@1
    findings: list[str]  # sentences; the first is the headline, the second what it rests on
    environment: dict[str, Any] = field(default_factory=environment)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def table(self) -> list[dict[str, Estimate]]:
        """The estimates of each source, strategy and length, by measure."""
        rows: dict[tuple[str, str, int], dict[str, Estimate]] = defaultdict(dict)
        for curve in self.curves:
            for point in curve.points:
                rows[curve.source, curve.strategy, point.length][curve.measure] = point
        return list(rows.values())


def analyse(results: Sequence[dict[str, Any]], config: dict[str, Any], of: int) -> Study:
    """Curves, trends and sentences. `results`: as `eval_suites.results` keeps them, of the finished ones of `of` points."""
    by_curve: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_curve[result["source"], result["strategy"]].append(result)
    curves = [curve(own, measure) for own in by_curve.values() for measure in MEASURES]
    common = {name: value for name, value in results[0]["settings"].items() if name not in ("texts", "seed")}
    rows = [{name: value for name, value in result.items() if name not in ("scores", "settings")} for result in results]
    return Study(config, common, rows, of, curves, rows[0]["chance"]["R@1"], findings(curves, rows, of))


# ----------------------------------------------------------------------------------------------------- figures


def curve(results: Sequence[dict[str, Any]], measure: str) -> Curve:
    """R@1 by length. `results`: the points of one source and strategy, of any seeds."""
    first = results[0]
    scores: dict[int, dict[int, Scores]] = defaultdict(dict)  # by length and seed
    for result in results:
        ways = DIRECTIONS if measure == "mean" else [measure]
        scores[result["length"]][result["seed"]] = np.mean([result["scores"][way] for way in ways], axis=0)
    estimates = []
    for length, by_seed in sorted(scores.items()):
        value, interval = _mean(list(by_seed.values()))
        estimates.append(Estimate(first["source"], first["strategy"], measure, length, value, interval, len(by_seed)))
    return Curve(first["source"], first["strategy"], measure, estimates, trend(scores))


def trend(scores: dict[int, dict[int, Scores]]) -> Trend | None:
    """The slope over log2 of the length, from scores by length and seed; of seeds that lack a length, nothing is used."""
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in scores.values())))
    if len(scores) < 2 or not seeds:
        return None
    x = np.log2(sorted(scores))
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slopes = [
        sum((w * scores[length][seed] for w, length in zip(weights, sorted(scores), strict=True)), np.zeros(1))
        for seed in seeds
    ]  # each [N]
    if len(slopes) > 1:
        return Trend(*over_trainings([float(slope.mean()) for slope in slopes], low=-1.0), len(slopes))
    (slope,) = slopes
    own = paired_difference(slope, np.zeros(len(slope)), range(len(slope)))
    return Trend(own.difference, own.interval, 1)


def _mean(trainings: list[Scores]) -> tuple[float, Interval]:
    if len(trainings) > 1:
        return over_trainings([float(scores.mean()) for scores in trainings], low=0.0)
    own = mean_score(trainings[0], range(len(trainings[0])))
    return own.value, own.interval


def over_trainings(values: Sequence[float], low: float) -> tuple[float, Interval]:
    """Mean and t-interval of several trainings' figures, which lie between `low` and 1."""
    mean = float(np.mean(values))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * float(np.std(values, ddof=1)) / sqrt(len(values))
    return mean, (max(low, mean - float(half)), min(1.0, mean + float(half)))


# --------------------------------------------------------------------------------------------------- sentences


def findings(curves: Sequence[Curve], rows: Sequence[dict[str, Any]], of: int) -> list[str]:
    """Headline, what it rests on, and a sentence for each curve."""
    means = [curve for curve in curves if curve.measure == "mean"]
    return [headline(means), basis(rows, of), *(_sentence(curve) for curve in means if curve.trend is not None)]


def headline(curves: Sequence[Curve]) -> str:
    """Of each source: the strategies under which R@1 falls with the length, rises, or does neither for certain."""
    parts = []
    for source, own in itertools.groupby(curves, lambda curve: curve.source):
        verdicts: dict[str, list[str]] = defaultdict(list)
        for curve in own:
            verdicts[curve.trend.verdict if curve.trend else "has one length only"].append(LABELS[curve.strategy])
        if len(verdicts) == 1:
            said = next(iter(verdicts)) + (" under every strategy" if sum(map(len, verdicts.values())) > 1 else "")
        else:
            said = "; ".join(f"{verdict} ({', '.join(names)})" for verdict, names in verdicts.items())
        parts.append(f"With longer {source} captions R@1 {said}.")
    return " ".join(parts)


def basis(rows: Sequence[dict[str, Any]], of: int) -> str:
    """How many trainings, on what, and what the intervals speak of."""
    row, seeds = rows[0], sorted({row["seed"] for row in rows})
    size = f"{row['samples']:,} pictures seen at each point, {row['n']:,} held out"
    part = "" if len(rows) == of else f"{len(rows)} of {of} points are finished. "
    if len(seeds) == 1:
        return (
            f"{part}One training per point (seed {seeds[0]}), {size}: intervals are over the held-out pictures, and do not know "
            "how far off another training would be."
        )
    count = f"{len(seeds)} trainings per point (seeds {', '.join(map(str, seeds))})"
    told = "intervals are over the trainings, on these held-out pictures"
    if part:
        return f"{part}Up to {count}, {size}: {told}; where a point has one training so far, over pictures."
    return f"{count}, {size}: {told}."


def _sentence(curve: Curve) -> str:
    assert curve.trend is not None
    first, last = (
        f"{percent(point.value)} % at {tokens(point.length)}" for point in (curve.points[0], curve.points[-1])
    )
    slope = f"{points(curve.trend.value)} points of R@1 {between(curve.trend.interval)}"
    return f"{curve.source}, {LABELS[curve.strategy]}: {slope} for each doubling of the length; {first}, {last}."


def tokens(count: int) -> str:
    """1 token, 8 tokens"""
    return f"{count} token{'' if count == 1 else 's'}"


def strategies(curves: Iterable[Curve]) -> list[str]:
    """The strategies that occur, in the order of `LABELS`."""
    present = {curve.strategy for curve in curves}
    return [name for name in LABELS if name in present]
