"""Intervals and paired tests from per-sample records. docs/statistics.md gives the reasons at length.

Two things are random. *Questions*: had other pictures and questions been drawn from the same source, how far would a figure
have moved? Questions about one picture rise and fall together, so pictures (MME: the category and question_id pair) are
the independent units, called clusters, and every function takes them. *Trainings*: had the recipe been run with another seed?
Scores of one training, `[n]`, can answer the first only; the result says `inference: checkpoint`. Scores of several, `[S, n]`, all
answering the same questions, answer both at once: `inference: recipe`. The trainings of two towers are paired row by row: row s of
both had the same seed, that is, the same order of the data and the same first projector.

Four choices, and why:

* **Variance over questions**: CR2, the "bias-reduced" cluster-robust variance of a mean, with the degrees of freedom of Bell and
  McCaffrey under the correlation within clusters that the data show (Imbens and Kolesár 2016). The common CR1 with G - 1
  degrees of freedom is too sure of itself when clusters differ in size, as they do in GQA. For an intercept alone all of
  it has a closed form; with clusters of equal size it is exactly the t-interval over cluster means, and with one question
  per picture the textbook t-interval.
* **Several trainings**: questions and trainings are crossed, both random. The variance of the grand mean is that of the trainings'
  means (S - 1 degrees of freedom; it holds the noise that each training adds to each question) plus what the questions
  themselves add: their variance less that noise. In a balanced table it is the ANOVA (and REML) estimate of the crossed mixed
  model. The t-quantile's 1/df is the mean of both parts' 1/df, weighted by their shares. Satterthwaite weights by squared shares,
  and with three seeds covers 92 %. Nothing is resampled: a bootstrap of three seeds has ten different samples.
* **Interval of a mean score**: Wilson's, with the number of independent questions that this variance amounts to. Unlike
  mean ± t * error it stays inside 0-1 and keeps its coverage close to the ends.
* **p-value of a paired difference**: the exact sign-flip test over clusters. If the two models are exchangeable, swapping
  their answers on a whole cluster changes nothing, so all sign patterns of the cluster sums are equally likely, and
  P(p <= alpha) <= alpha holds at any sample size. A t-test promises this for many differing questions only, and
  two similar models differ on few. With right/wrong scores and one question per picture it is McNemar's exact test.
  About recipes, the larger of this p-value and Banerjee's (1961), whose level is proven for a sum of variances with any
  degrees of freedom: a claim about two recipes must at least hold for the models that were trained.

Scores lie in 0-1. POPE's F1 is no mean over questions and is not tested here; the MME score is a sum of means over pairs, and is.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, isfinite, log, sqrt
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, optimize, special, stats

from clips_core.errors import InputError

if TYPE_CHECKING:
    from eval_suites.records import Key, Record

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
POWER = 0.80
# Right/wrong scores, VQA soft accuracies and tenths are all multiples of 1/60: on this lattice the sign-flip test is exact.
LATTICE = 60
# Sums that are on no lattice are laid on one on which their absolute values add up to this many units.
UNITS = 2**18
SMALLEST_P = 1e-13  # of the t-based test: beyond it, its quantiles are not computed well

Array = NDArray[np.float64]
Inference = Literal["checkpoint", "recipe"]

# MME's categories: its two scores are sums over these.
MME_PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


@dataclass(frozen=True)
class Mean:
    """A mean score with its 95 % interval."""

    value: float
    interval: tuple[float, float]
    inference: Inference
    n_samples: int  # questions
    n_seeds: int  # trainings that answered them
    n_clusters: int  # independent units among the questions


@dataclass(frozen=True)
class Difference:
    """Mean score of a minus that of b over the same questions, its 95 % interval and two-sided p-value."""

    difference: float
    interval: tuple[float, float]
    p_value: float
    detectable: (
        float | None
    )  # true difference that this design would have found (p <= 5 %) four times in five; None: unknown
    inference: Inference
    n_samples: int
    n_seeds: int
    n_clusters: int


@dataclass(frozen=True)
class Repeated:
    """A mean of scores that a judge gave several times."""

    mean: Mean  # its interval holds the judge's noise
    judge_error: float | None  # standard error from that noise alone: the same answers, judged anew; None: judged once
    n_repeats: int


@dataclass(frozen=True, eq=False)
class Answers:
    """Scores of two towers' models on one benchmark's questions; row s of both was trained with the same seed."""

    a: Array  # [S, n]
    b: Array  # [S, n]
    clusters: Sequence[Hashable]  # [n]; a name stands for the same picture in every benchmark


@dataclass(frozen=True)
class SuiteDifference:
    """Two towers on a suite: one primary endpoint, declared beforehand, and the benchmarks."""

    primary: Difference  # mean over the benchmarks of (a - b) / standard deviation of a question's score
    benchmarks: dict[str, Difference]  # in accuracy; secondary
    adjusted_p: dict[str, float]  # theirs after Holm


# ------------------------------------------------------------------------------------------------------ scores


def mean_score(scores: ArrayLike, clusters: Sequence[Hashable]) -> Mean:
    """Mean of `scores` [n] or [S, n] in 0-1 with a Wilson interval; `clusters` [n] names each question's cluster.

    One cluster says nothing about another: its interval is 0 to 1. Where no two clusters differ (all answers right, say),
    the interval allows for the largest share of different clusters that would still, one time in twenty, stay unseen.
    """
    design = _design(clusters)
    found = _estimate(_trainings(scores, clusters), design)
    if not 0 < found.variance < np.inf:
        interval = _without_variance(found, design, 0.0, 1.0)
    else:
        low, high = wilson(found.value, found.variance, found.df)
        interval = (float(low), float(high))
    return Mean(float(found.value), interval, *_basis(found, design))


def wilson(mean: ArrayLike, variance: ArrayLike, df: ArrayLike) -> tuple[Array, Array]:
    """Wilson's interval of a mean in 0-1 with that variance: the shares at most t standard errors away, at *their* variance.

    Arrays of one shape, or numbers. The number of independent right/wrong questions is p (1 - p) / variance.
    """
    p, t = np.asarray(mean), _t(df, ALPHA)
    effective = p * (1 - p) / variance
    centre = (p + t**2 / (2 * effective)) / (1 + t**2 / effective)
    half = t / (1 + t**2 / effective) * np.sqrt(p * (1 - p) / effective + t**2 / (4 * effective**2))
    return np.maximum(0.0, centre - half), np.minimum(1.0, centre + half)


def paired_difference(a: ArrayLike, b: ArrayLike, clusters: Sequence[Hashable]) -> Difference:
    """Mean of `a` minus mean of `b`, each [n] or [S, n]: scores in 0-1 of two towers' models on the questions in `clusters` [n].

    The interval is difference ± t * error; for the p-value see the module's text. With few differing questions the two may
    disagree about zero: call a difference real only where both do. (The interval is the weaker one there: where some 20
    differing questions about 25 to 40 pictures go nearly all one way, it covers about 90 %.)
    One cluster gives the interval -1 to 1 and p = 1; where no two clusters differ, the interval is made as `mean_score`'s.
    """
    first, second = _pair(a, b, clusters)
    differences = first - second
    return _difference(differences, differences, _design(clusters), 1.0)


def with_repeats(scores: ArrayLike, clusters: Sequence[Hashable]) -> Repeated:
    """Mean of `scores` [n, R] that a judge gave to each of n answers R times, in 0-1.

    Repeats are nested in answers: they sharpen each answer's score and are no further questions. The interval is over the answers'
    mean scores, whose spread holds the judge's noise (divided by R) besides that of the questions. For a paired test give
    `scores.mean(axis=1)` of both towers, judged by the same judge. What a judge gets wrong every time is in no interval.
    """
    values = np.asarray(scores, dtype=float)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"expected scores [n, repeats], not of shape {list(values.shape)}")
    n, repeats = values.shape
    mean = mean_score(values.mean(axis=1), clusters)
    error = sqrt(values.var(axis=1, ddof=1).sum() / repeats) / n if repeats > 1 else None
    return Repeated(mean, error, repeats)


def recall_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a recall: `hits` of `n` queries."""
    interval = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


# ------------------------------------------------------------------------------------------------------- suite


def paired_answers(a: Sequence["Mapping[Key, Record]"], b: Sequence["Mapping[Key, Record]"]) -> dict[str, Answers]:
    """The answers of two towers by benchmark, from the records of each of their trainings in the order of the seeds.

    Raises:
        InputError: unless both have equally many trainings and all of these answered the same questions.
    """
    if not a or len(a) != len(b):
        raise InputError(f"trainings are paired by seed, but there are {len(a)} of one tower and {len(b)} of the other")
    first = a[0]
    for records in (*a, *b):
        for task, doc_id in sorted(first.keys() ^ records.keys())[:1]:
            raise InputError(f"not all trainings answered the same questions: {task} {doc_id} is missing in some")
    keys: dict[str, list[Key]] = {}
    for key in first:
        keys.setdefault(key[0], []).append(key)
    return {
        task: Answers(
            np.array([[records[key].score for key in own] for records in a], dtype=float),
            np.array([[records[key].score for key in own] for records in b], dtype=float),
            [first[key].cluster for key in own],
        )
        for task, own in keys.items()
    }


def suite_difference(suite: Mapping[str, Answers]) -> SuiteDifference:
    """The primary endpoint, and every benchmark by itself with Holm's adjusted p-value."""
    benchmarks = {name: paired_difference(own.a, own.b, own.clusters) for name, own in suite.items()}
    adjusted = holm([row.p_value for row in benchmarks.values()])
    return SuiteDifference(
        standardised_difference(list(suite.values())), benchmarks, dict(zip(benchmarks, adjusted, strict=True))
    )


def standardised_difference(benchmarks: Sequence[Answers]) -> Difference:
    """Mean over `benchmarks` of the standardised difference: that of the means over the standard deviation of one score.

    Every benchmark counts the same, whatever its size and how hard it is. The benchmarks are those of the suite, not drawn from
    a population of benchmarks; questions and trainings are. A training's answers to all benchmarks come from the same model, so
    its figure is the mean over benchmarks, and trainings vary by that. A picture in two benchmarks is one cluster. A
    benchmark that all models answer alike, all right or all wrong, adds zero.
    """
    pairs = [_pair(own.a, own.b, own.clusters) for own in benchmarks]
    parts = [_standardised(a, b) for a, b in pairs]
    clusters = [name for own in benchmarks for name in own.clusters]
    strata = [number for number, own in enumerate(benchmarks) for _ in own.clusters]
    largest = float(np.mean([1 / scale.item() for _, _, scale in parts]))  # all questions answered by one tower only
    return _difference(
        np.concatenate([linear for linear, _, _ in parts], axis=-1),
        np.concatenate([signed for _, signed, _ in parts], axis=-1),
        _design(clusters, strata, 1 / len(benchmarks)),
        largest,
    )


def _standardised(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Of scores [..., S, n]: values with the mean and variance of the standardised difference; differences in its unit; the unit.

    The unit is the standard deviation of all scores of both towers about their common mean. Swapping the towers on any
    questions leaves it as it is: the sign-flip test stays exact. It is estimated too, and the first term of its error is in the
    values (the delta method): (a - b) / s less mean / 2 * (what this question adds to s² - s²) / s².
    """
    axes = (-2, -1)
    middle = (a.mean(axes, keepdims=True) + b.mean(axes, keepdims=True)) / 2
    spread = ((a - middle) ** 2 + (b - middle) ** 2) / 2
    variance = spread.mean(axes, keepdims=True)
    variance = np.where(variance > 1e-18, variance, 1.0)  # nothing varies: all differences are 0 in any unit
    signed = (a - b) / np.sqrt(variance)
    excess = (spread - spread.mean(axes, keepdims=True)) / variance
    return signed - signed.mean(axes, keepdims=True) / 2 * excess, signed, np.sqrt(variance)


# --------------------------------------------------------------------------------------------------------- MME


def mme_score(scores: ArrayLike, clusters: Sequence[Hashable], categories: Sequence[str]) -> Mean:
    """MME's score in points with its 95 % interval, from right/wrong `scores` [n] or [S, n] of pairs of questions.

    The sum over categories of accuracy + accuracy+ in percent, accuracy+ being the share of pairs answered right on both
    questions: at most 200 for each category. Give the questions of MME_PERCEPTION or those of MME_COGNITION.
    Pairs are drawn within their category.
    """
    points, design = _mme_points(_trainings(scores, clusters), clusters, categories)
    found = _estimate(points, design)
    interval = _t_interval(found, design, 0.0, 200.0 * len(design.n))
    mean = Mean(float(found.value), interval, *_basis(found, design))
    return replace(mean, n_samples=len(clusters))


def mme_difference(a: ArrayLike, b: ArrayLike, clusters: Sequence[Hashable], categories: Sequence[str]) -> Difference:
    """Two towers' difference in MME points; arguments as for `mme_score`, results as for `paired_difference`."""
    (first, design), (second, _) = (_mme_points(own, clusters, categories) for own in _pair(a, b, clusters))
    differences = first - second
    found = _difference(differences, differences, design, 200.0 * len(design.n))
    return replace(found, n_samples=len(clusters))


def _mme_points(values: Array, clusters: Sequence[Hashable], categories: Sequence[str]) -> tuple[Array, "_Design"]:
    """Points [S, pairs] of 0, 50 or 200 that each pair adds to its category's mean, and the pairs' design."""
    index = _numbers(clusters)
    counts = np.bincount(index)
    for odd in np.flatnonzero(counts[index] != 2).tolist()[:1]:
        raise ValueError(f"MME is about pairs of questions, but {clusters[odd]!r} has {counts[index[odd]]}")
    order = np.argsort(index, kind="stable")
    pairs = values[..., order].reshape(*values.shape[:-1], -1, 2)
    points = 100 * pairs.mean(axis=-1) + 100 * (pairs.sum(axis=-1) == 2)
    of_pairs = [categories[i] for i in order[::2].tolist()]
    return points, _design(range(len(of_pairs)), of_pairs)


# ------------------------------------------------------------------------------------------------------- tests


def sign_flip_p(cluster_sums: ArrayLike, lattice: float = LATTICE) -> float:
    """Two-sided p-value of the exact sign-flip test: P(|sum of ±D_g| >= |sum of D_g|) over all 2^G sign patterns.

    `cluster_sums` [G] are the summed differences of each cluster, rounded to multiples of 1 / lattice. (Rounding is symmetric
    about zero, so the test keeps its level for scores off that lattice.) The distribution of a sum of independent ±k is
    read off its characteristic function, the product of cos(k t): no patterns are enumerated, no seed is needed.
    """
    signed = np.rint(np.asarray(cluster_sums, dtype=float) * lattice).astype(np.int64)
    sizes, counts = np.unique(np.abs(signed[signed != 0]), return_counts=True)
    if len(sizes) == 0:
        return 1.0
    unit = np.gcd.reduce(sizes)
    sizes, observed = sizes // unit, abs(int(signed.sum())) // unit
    largest = int((sizes * counts).sum())
    length = fft.next_fast_len(2 * largest + 1, real=True)
    cosine = np.cos(2 * np.pi * np.arange(length) / length)
    frequency = np.arange(length // 2 + 1)  # the other half mirrors it
    transform = np.ones(len(frequency))
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        transform *= cosine[size * frequency % length] ** count
    probability = fft.irfft(transform, length)  # probability[s mod length] = P(sum = s)
    p = probability[observed : largest + 1].sum() * 2 if observed else 1.0
    # The transform is good to about 1e-15; no p-value is smaller than that of the two most extreme patterns.
    return float(np.clip(p, 2.0 ** (1 - int(counts.sum())), 1.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: those <= alpha hold together, with at most alpha risk of any false one among them."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def better_of(a: str, b: str, difference: float, p_value: float, interval: Sequence[float]) -> str | None:
    """The better of two, by the mean of `a` minus that of `b`; None: it cannot be told.

    It can where p, adjusted where it is one of several, is at most 5 %, and the interval leaves out zero.
    """
    if p_value > ALPHA or interval[0] <= 0 <= interval[1]:
        return None
    return a if difference > 0 else b


# --------------------------------------------------------------------------------- the two-way random-effects mean


@dataclass(frozen=True, eq=False)
class _Design:
    """Which values belong together. A unit holds the values of one stratum (benchmark, category) in one cluster."""

    order: NDArray[np.int64]  # [n] the values sorted by cluster, then stratum
    first: NDArray[np.int64]  # [U] where in that order each unit starts
    first_unit: NDArray[np.int64]  # [G] the first unit of each cluster
    sizes: NDArray[np.int64]  # [U] values of each unit
    stratum: NDArray[np.int64]  # [U] its stratum
    n: NDArray[np.int64]  # [K] values of each stratum
    weight: float  # the estimate is weight * the sum of the strata's means


@dataclass(frozen=True, eq=False)
class _Estimate:
    """An estimate and the parts of its variance. All fields are arrays [...] over whatever stood before the last two axes."""

    value: Any
    questions: Any  # variance of the mean over trainings, from the questions (CR2): their own and the noise
    questions_df: Any
    noise: Any  # the part of it that each training adds to each question
    trainings: Any  # variance over the trainings' means: their own and the noise; 0 for one training
    n_seeds: int

    @property
    def between(self) -> Any:
        """What the questions add beyond the noise."""
        return np.maximum(self.questions - self.noise, 0.0)

    @property
    def variance(self) -> Any:
        return self.between + self.trainings

    @property
    def df(self) -> Any:
        """1/df is the mean of both parts' 1/df, weighted by their shares of the variance."""
        share = np.divide(self.trainings, self.variance, out=np.zeros_like(self.variance), where=self.variance > 0)
        return 1 / (share / max(self.n_seeds - 1, 1) + (1 - share) / self.questions_df)

    def reach(self, alpha: float, trainings: Any = None) -> Any:
        """The smallest |estimate| with Banerjee's p <= `alpha`; `trainings` in place of the variance that was found.

        reach² is the sum of t² * variance over both parts, each with its own t. The squared standard normal's distribution
        function is concave, so P(|estimate| <= reach) is at least the share-weighted mean of what each part alone has: 1 - alpha.
        """
        own = self.trainings if trainings is None else trainings
        return np.sqrt(
            _t(max(self.n_seeds - 1, 1), alpha) ** 2 * own + _t(self.questions_df, alpha) ** 2 * self.between
        )


def _estimate(values: Array, design: _Design) -> _Estimate:
    """The weighted sum of strata means of `values` [..., S, n], averaged over the S trainings, with its variances [...].

    With n_g values and residual sum r_g in cluster g, the leverage of an intercept is n_g / n, hence
    CR2 = sum r_g² / (1 - n_g / n) / n². The noise has the same formula over doubly centred sums: those of a training less the
    mean over trainings.
    """
    seeds = values.shape[-2]
    sums = np.add.reduceat(values[..., design.order], design.first, axis=-1)  # [..., S, U]
    strata = np.arange(len(design.n))
    means = sums @ (design.stratum[:, None] == strata).astype(float) / design.n  # [..., S, K]
    by_training = design.weight * means.sum(axis=-1)  # [..., S]
    residuals = sums - design.sizes * means[..., design.stratum]
    # Sums of decimals leave rounding noise where nothing varies.
    residuals[np.abs(residuals) < 1e-9] = 0.0
    shared = residuals.mean(axis=-2)  # [..., U]
    questions, df = _over_clusters(values.mean(axis=-2), shared, means.mean(axis=-2), design)
    noise = trainings = np.zeros_like(questions)
    if seeds > 1:
        own = (residuals - shared[..., None, :]) * _scale(design)
        noise = (np.add.reduceat(own, design.first_unit, axis=-1) ** 2).sum(axis=(-2, -1)) / (seeds * (seeds - 1))
        trainings = by_training.var(axis=-1, ddof=1) / seeds
        trainings = np.where(trainings < 1e-18, 0.0, trainings)
    return _Estimate(by_training.mean(axis=-1), questions, df, noise, trainings, seeds)


def _scale(design: _Design) -> Array:
    """[U]: what turns a unit's residual sum into its term of the estimate, with CR2's adjustment."""
    share = design.sizes / design.n[design.stratum]
    return design.weight / design.n[design.stratum] / np.sqrt(np.where(share < 1, 1 - share, 1.0))


def _over_clusters(values: Array, residuals: Array, means: Array, design: _Design) -> tuple[Any, Any]:
    """CR2 variance [...] over clusters, and its degrees of freedom.

    `values` [..., n] and their strata's `means` [..., K] are those over the trainings, `residuals` [..., U] the units' sums.
    A stratum with one cluster only says nothing about others: the variance is infinite.
    """
    if (design.sizes == design.n[design.stratum]).any():
        return np.full(values.shape[:-1], np.inf), np.ones(values.shape[:-1])
    terms = residuals * _scale(design)
    variance = (np.add.reduceat(terms, design.first_unit, axis=-1) ** 2).sum(axis=-1)
    squares = np.add.reduceat(values[..., design.order] ** 2, design.first, axis=-1)
    total, inverse = np.zeros_like(variance), np.zeros_like(variance)
    for stratum, n in enumerate(design.n.tolist()):
        own = design.stratum == stratum
        sizes = design.sizes[own].astype(float)
        around = np.maximum(squares[..., own].sum(axis=-1) - n * means[..., stratum] ** 2, 0.0)
        pairs = (sizes * (sizes - 1)).sum()
        products = (residuals[..., own] ** 2).sum(axis=-1) - around  # of residuals in one cluster
        known = (around > 1e-9) & (pairs > 0)
        correlation = np.where(known, products / max(pairs, 1.0) / np.where(known, around / n, 1.0), 0.0)
        of_stratum = (terms[..., own] ** 2).sum(axis=-1)
        total += of_stratum
        inverse += of_stratum**2 / _degrees_of_freedom(sizes, np.clip(correlation, 0.0, 1.0))
    # Satterthwaite's sum over strata, whose parts have many degrees of freedom each.
    return variance, np.where(total > 0, total**2 / np.where(inverse > 0, inverse, 1.0), 1.0)


def _degrees_of_freedom(sizes: Array, correlation: Array) -> Array:
    """2 E² / Var of CR2 for clusters of `sizes` [G], whose values have equal variances and equal `correlation` [...].

    CR2 is r'Cr with C = diag(1 / (1 - w)) and residual sums r of covariance S = diag(v) - v w' - w v' + t w w', where w are
    the clusters' shares of the values, v the variances of their sums and t the sum of v: hence (tr CS)² / tr CSCS.
    """
    w = sizes / sizes.sum()
    c = 1 / (1 - w)
    v = sizes * (1 + (sizes - 1) * correlation[..., None])
    t = v.sum(axis=-1, keepdims=True)
    diagonal = v - 2 * v * w + t * w**2
    ww, vw, vv = (c * w**2).sum(), (c * v * w).sum(axis=-1), (c * v**2).sum(axis=-1)
    t = t[..., 0]
    squared = (c**2 * v * (2 * diagonal - v)).sum(axis=-1) + t**2 * ww**2 + 2 * ww * vv - 4 * t * ww * vw + 2 * vw**2
    return (c * diagonal).sum(axis=-1) ** 2 / squared


# ----------------------------------------------------------------------------------------------------- results


def _difference(values: Array, signed: Array, design: _Design, largest: float) -> Difference:
    """The result for paired `values` [S, n] of at most ±`largest`; where answers are swapped, `signed` [S, n] turns its sign."""
    found = _estimate(values, design)
    p = _flip_p(signed, design)
    if found.n_seeds > 1:
        p = max(p, _banerjee_p(found))
    return Difference(
        float(found.value),
        _t_interval(found, design, -largest, largest),
        p,
        _detectable(found),
        *_basis(found, design),
    )


def _basis(found: _Estimate, design: _Design) -> tuple[Inference, int, int, int]:
    """inference, n_samples, n_seeds, n_clusters"""
    inference: Inference = "recipe" if found.n_seeds > 1 else "checkpoint"
    return inference, len(design.order), found.n_seeds, len(design.first_unit)


def _t_interval(found: _Estimate, design: _Design, low: float, high: float) -> tuple[float, float]:
    if not 0 < found.variance < np.inf:
        return _without_variance(found, design, low, high)
    half = float(_t(found.df, ALPHA) * np.sqrt(found.variance))
    return max(low, float(found.value) - half), min(high, float(found.value) + half)


def _without_variance(found: _Estimate, design: _Design, low: float, high: float) -> tuple[float, float]:
    """Interval within `low` to `high` where clusters show no variance, or cannot.

    Had a share u of all clusters behaved otherwise, seeing none of them among G would have probability (1 - u)^G, which
    is 5 % at the u taken here; those clusters could have any value. One cluster alone bounds nothing (u = 1).
    """
    unseen = 1 - (1 - CONFIDENCE) ** (1 / len(design.first_unit)) if isfinite(found.variance) else 1.0
    value = float(found.value)
    return value - unseen * (value - low), value + unseen * (high - value)


def _flip_p(signed: Array, design: _Design) -> float:
    """Sign-flip p-value of the estimate over clusters, all trainings' answers to a cluster being swapped together."""
    sums = np.add.reduceat(signed.sum(axis=-2)[design.order], design.first)  # [U]
    if len(design.n) == 1:
        return sign_flip_p(np.add.reduceat(sums, design.first_unit))
    sums = np.add.reduceat(sums / design.n[design.stratum], design.first_unit)
    total = np.abs(sums).sum()
    return sign_flip_p(sums, UNITS / total) if total > 0 else 1.0


def _banerjee_p(found: _Estimate) -> float:
    """The p-value at which `found.reach` is the estimate."""
    size = abs(float(found.value))
    if size == 0 or not isfinite(found.variance):
        return 1.0
    if found.reach(SMALLEST_P) <= size:
        return SMALLEST_P
    return exp(optimize.brentq(lambda log_p: float(found.reach(exp(log_p))) - size, log(SMALLEST_P), 0.0))


def _detectable(found: _Estimate) -> float | None:
    """The true difference at which the t-based test has 80 % power, were the variances what was found.

    The power is averaged over what S trainings would have shown of their variance: the chi-squared distribution in equal parts.
    """
    if not 0 < found.variance < np.inf:
        return None
    error, df = sqrt(found.variance), max(found.n_seeds - 1, 1)
    shown = found.trainings * special.chdtri(df, 1 - (np.arange(400) + 0.5) / 400) / df
    reach = found.reach(ALPHA, shown)

    def missing(true: float) -> float:
        return POWER - float(np.mean(special.ndtr((true - reach) / error) + special.ndtr((-true - reach) / error)))

    return float(optimize.brentq(missing, 0.0, float(reach.max()) + 10 * error))


def _t(df: ArrayLike, alpha: float) -> Any:
    """Two-sided critical value of Student's t."""
    return -special.stdtrit(df, alpha / 2)


# -------------------------------------------------------------------------------------------------------- input


def _trainings(scores: ArrayLike, clusters: Sequence[Hashable]) -> Array:
    """`scores` [n] or [S, n] as [S, n]."""
    values = np.asarray(scores, dtype=float)
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or values.size == 0 or values.shape[1] != len(clusters):
        raise ValueError(
            f"expected as many clusters as scores, and some: {len(clusters)} and {' × '.join(map(str, np.shape(scores)))}"
        )
    return values


def _pair(a: ArrayLike, b: ArrayLike, clusters: Sequence[Hashable]) -> tuple[Array, Array]:
    """Both towers' scores as [S, n]."""
    first, second = _trainings(a, clusters), _trainings(b, clusters)
    if len(first) != len(second):
        raise ValueError(f"trainings are paired: {len(first)} of a and {len(second)} of b")
    return first, second


def _design(clusters: Sequence[Hashable], strata: Sequence[Hashable] | None = None, weight: float = 1.0) -> _Design:
    """The design of values in `clusters` [n] and `strata` [n] (None: one stratum)."""
    cluster = _numbers(clusters)
    stratum = np.zeros_like(cluster) if strata is None else _numbers(strata)
    order = np.lexsort((stratum, cluster))
    by_cluster, by_stratum = cluster[order], stratum[order]
    starts = (np.diff(by_cluster, prepend=-1) != 0) | (np.diff(by_stratum, prepend=-1) != 0)
    first = np.flatnonzero(starts)
    return _Design(
        order=order,
        first=first,
        first_unit=np.flatnonzero(np.diff(by_cluster[first], prepend=-1) != 0),
        sizes=np.diff(first, append=len(order)),
        stratum=by_stratum[first],
        n=np.bincount(stratum),
        weight=weight,
    )


def _numbers(names: Sequence[Hashable]) -> NDArray[np.int64]:
    """0, 1, … for the different names in the order in which they occur."""
    number = {name: g for g, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], dtype=np.int64)
