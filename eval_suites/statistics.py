"""Intervals and paired tests from per-sample records.

The uncertainty described here is that of the *questions*: had other pictures and questions been drawn from the same
source, how far would a figure have moved? Questions about one picture rise and fall together, so pictures (MME: the
category and question_id pair) are the independent units, called clusters, and every function takes them. What another
training of the same model would have done is a different question, which no number of test questions can answer.

Three choices, and why:

* **Variance**: CR2, the "bias-reduced" cluster-robust variance of a mean, with the degrees of freedom of Bell and
  McCaffrey under the correlation within clusters that the data show (Imbens and Kolesár 2016). The common CR1 with G - 1
  degrees of freedom is too sure of itself when clusters differ in size, as they do in GQA. For an intercept alone all of
  it has a closed form; with clusters of equal size it is exactly the t-interval over cluster means, and with one question
  per picture the textbook t-interval.
* **Interval of a mean score**: Wilson's, with the number of independent questions that this variance amounts to. Unlike
  mean ± t * error it stays inside 0-1 and keeps its coverage close to the ends.
* **p-value of a paired difference**: the exact sign-flip test over clusters. If the two models are exchangeable, swapping
  their answers on a whole cluster changes nothing, so all sign patterns of the cluster sums are equally likely, and
  P(p <= alpha) <= alpha holds at any sample size. A t-test promises this for many differing questions only, and
  two similar models differ on few. With right/wrong scores and one question per picture it is McNemar's exact test.

Scores lie in 0-1. Figures that are no mean over questions (POPE's F1, the MME score) are not tested here: the tested
quantity is the mean per-sample score, called *accuracy*.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, stats

CONFIDENCE = 0.95
# Right/wrong scores, VQA soft accuracies and tenths are all multiples of 1/60: on this lattice the sign-flip test is exact.
LATTICE = 60


@dataclass(frozen=True)
class Mean:
    """A mean score with its 95 % interval, over `n` questions in `n_clusters` independent clusters."""

    value: float
    interval: tuple[float, float]
    n: int
    n_clusters: int


@dataclass(frozen=True)
class Difference:
    """Mean score of a minus that of b over the same questions, its 95 % interval and two-sided p-value."""

    difference: float
    interval: tuple[float, float]
    p_value: float
    n: int
    n_clusters: int


def mean_score(scores: ArrayLike, clusters: Sequence[Hashable]) -> Mean:
    """Mean of `scores` [n] in 0-1 with a cluster-robust Wilson interval; `clusters` [n] names each one's cluster.

    One cluster says nothing about another: its interval is 0 to 1. Where no two clusters differ (all answers right, say),
    the interval allows for the largest share of different clusters that would still, one time in twenty, stay unseen.
    """
    values = np.asarray(scores, dtype=float)
    moments = _clustered_mean(values, clusters)
    if moments.n_clusters == 1 or moments.variance == 0:
        interval = _without_variance(moments, low=0.0)
    else:
        p, t = moments.mean, _quantile(moments.df)
        effective = p * (1 - p) / moments.variance
        centre = (p + t**2 / (2 * effective)) / (1 + t**2 / effective)
        half = t / (1 + t**2 / effective) * sqrt(p * (1 - p) / effective + t**2 / (4 * effective**2))
        interval = (max(0.0, centre - half), min(1.0, centre + half))
    return Mean(moments.mean, interval, len(values), moments.n_clusters)


def paired_difference(a: ArrayLike, b: ArrayLike, clusters: Sequence[Hashable]) -> Difference:
    """Mean of `a` [n] minus mean of `b` [n], scores in 0-1 of two models on the same questions in `clusters` [n].

    The interval is difference ± t * CR2 error; the p-value that of the exact sign-flip test (see the module's text). With
    few differing questions the two may disagree about zero: call a difference real only where both do. (The interval is the
    weaker one there: where some 20 differing questions about 25 to 40 pictures go nearly all one way, it covers about 90 %.)
    One cluster gives the interval -1 to 1 and p = 1; where no two clusters differ, the interval is made as `mean_score`'s.
    """
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    moments = _clustered_mean(differences, clusters)
    if moments.n_clusters == 1 or moments.variance == 0:
        interval = _without_variance(moments, low=-1.0)
    else:
        half = _quantile(moments.df) * sqrt(moments.variance)
        interval = (max(-1.0, moments.mean - half), min(1.0, moments.mean + half))
    return Difference(moments.mean, interval, sign_flip_p(moments.sums), len(differences), moments.n_clusters)


def recall_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a recall: `hits` of `n` queries."""
    interval = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def sign_flip_p(cluster_sums: ArrayLike) -> float:
    """Two-sided p-value of the exact sign-flip test: P(|sum of ±D_g| >= |sum of D_g|) over all 2^G sign patterns.

    `cluster_sums` [G] are the summed differences of each cluster, rounded to multiples of 1/60. (Rounding is symmetric
    about zero, so the test keeps its level for scores off that lattice.) The distribution of a sum of independent ±k is
    read off its characteristic function, the product of cos(k t): no patterns are enumerated, no seed is needed.
    """
    signed = np.rint(np.asarray(cluster_sums, dtype=float) * LATTICE).astype(np.int64)
    sizes, counts = np.unique(np.abs(signed[signed != 0]), return_counts=True)
    if len(sizes) == 0:
        return 1.0
    unit = np.gcd.reduce(sizes)
    sizes, observed = sizes // unit, abs(int(signed.sum())) // unit
    largest = int((sizes * counts).sum())
    length = fft.next_fast_len(2 * largest + 1)
    frequency = np.arange(length)
    transform = np.ones(length)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        transform *= np.cos(2 * np.pi * (size * frequency % length) / length) ** count
    probability = fft.fft(transform).real / length  # probability[s mod length] = P(sum = s)
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


@dataclass(frozen=True)
class _Moments:
    mean: float
    variance: float  # of the mean, CR2
    df: float  # Bell-McCaffrey
    sums: NDArray[np.float64]  # [G], one sum of values for each cluster
    n_clusters: int


def _clustered_mean(values: NDArray[np.float64], clusters: Sequence[Hashable]) -> _Moments:
    """Mean of `values` [n] with CR2 variance and degrees of freedom, `clusters` [n] being the independent units.

    With n_g items and residual sum r_g in cluster g, the leverage of an intercept is n_g / n, hence
    CR2 = sum r_g² / (1 - n_g / n) / n².
    """
    if len(values) == 0 or len(values) != len(clusters):
        raise ValueError(f"expected as many clusters as scores, and some: {len(clusters)} and {len(values)}")
    number = {name: g for g, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([number[name] for name in clusters])
    n, mean = len(values), float(values.mean())
    sums: NDArray[np.float64] = np.bincount(index, weights=values).astype(float)
    if len(sums) == 1:
        return _Moments(mean, 0.0, 0.0, sums, 1)
    sizes = np.bincount(index).astype(float)
    residuals = sums - sizes * mean
    # Sums of decimals leave rounding noise where nothing varies.
    residuals[np.abs(residuals) < 1e-9] = 0.0
    variance = float((residuals**2 / (1 - sizes / n)).sum() / n**2)
    squares, pairs = ((values - mean) ** 2).sum(), (sizes * (sizes - 1)).sum()
    correlation = (residuals**2).sum() - squares  # sum of products of residuals in one cluster
    correlation = np.clip(correlation / pairs / (squares / n), 0, 1) if pairs and squares else 0.0
    return _Moments(mean, variance, _degrees_of_freedom(sizes, float(correlation)), sums, len(sums))


def _degrees_of_freedom(sizes: NDArray[np.float64], correlation: float) -> float:
    """2 E² / Var of CR2 for clusters of `sizes` [G], whose items have equal variances and equal `correlation`.

    CR2 is r'Cr with C = diag(1 / (1 - w)) and residual sums r of covariance S = diag(v) - v w' - w v' + t w w', where w are
    the clusters' shares of the items, v the variances of their sums and t the sum of v: hence (tr CS)² / tr CSCS.
    """
    w = sizes / sizes.sum()
    c = 1 / (1 - w)
    v = sizes * (1 + (sizes - 1) * correlation)
    t = v.sum()
    diagonal = v - 2 * v * w + t * w**2
    ww, vw, vv = (c * w**2).sum(), (c * v * w).sum(), (c * v**2).sum()
    squared = (c**2 * v * (2 * diagonal - v)).sum() + t**2 * ww**2 + 2 * ww * vv - 4 * t * ww * vw + 2 * vw**2
    return float((c * diagonal).sum() ** 2 / squared)


def _without_variance(moments: _Moments, low: float) -> tuple[float, float]:
    """Interval within `low` to 1 where the clusters show no variance.

    Had a share u of all clusters behaved otherwise, seeing none of them among G would have probability (1 - u)^G, which
    is 5 % at the u taken here; those clusters could have any value. One cluster alone bounds nothing (u = 1).
    """
    unseen = 1 - (1 - CONFIDENCE) ** (1 / moments.n_clusters) if moments.n_clusters > 1 else 1.0
    return moments.mean - unseen * (moments.mean - low), moments.mean + unseen * (1 - moments.mean)


def _quantile(df: float) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, df))
