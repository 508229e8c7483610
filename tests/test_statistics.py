"""Intervals and tests against scipy, plain matrix algebra, enumeration and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from eval_suites.statistics import holm, mean_score, paired_difference, recall_interval, sign_flip_p


def uneven_clusters(rng: np.random.Generator, n_clusters: int = 30) -> list[str]:
    return [f"picture {g}" for g in range(n_clusters) for _ in range(rng.integers(1, 9))]


# ------------------------------------------------------------------------------------------------- intervals


def test_one_question_a_picture_gives_the_paired_t_interval():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 80))
    found = paired_difference(a, b, range(80))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.difference == pytest.approx(a.mean() - b.mean())
    assert (found.n, found.n_clusters) == (80, 80)


def test_clusters_of_one_size_give_the_t_interval_over_cluster_means():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2, (2, 40, 6))
    found = paired_difference(a.ravel(), b.ravel(), np.repeat(np.arange(40), 6).tolist())
    expected = stats.ttest_1samp((a - b).mean(axis=1), 0).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert (found.n, found.n_clusters) == (240, 40)


@pytest.mark.parametrize("alike", [0.0, 0.7])
def test_uneven_clusters_give_cr2_with_its_degrees_of_freedom(alike: float):
    """Against the general matrix formulas (Bell and McCaffrey; Imbens and Kolesár) of a regression on an intercept."""
    rng = np.random.default_rng(2)
    clusters = uneven_clusters(rng)
    n = len(clusters)
    members = [np.flatnonzero([c == name for c in clusters]) for name in dict.fromkeys(clusters)]
    a, b = rng.integers(0, 2, (2, n))
    for own in members:
        if rng.random() < alike:
            a[own], b[own] = a[own[0]], b[own[0]]
    d = (a - b).astype(float)
    residuals = d - d.mean()

    X = np.ones((n, 1))
    bread = np.linalg.inv(X.T @ X)
    annihilator = np.eye(n) - X @ bread @ X.T
    scores, columns = [], []
    for own in members:
        values, vectors = np.linalg.eigh(annihilator[np.ix_(own, own)])
        adjust = vectors @ np.diag(values**-0.5) @ vectors.T  # (I - H_gg)^(-1/2)
        scores.append(X[own].T @ adjust @ residuals[own])
        columns.append(annihilator[:, own] @ adjust @ X[own] @ bread)
    variance = (bread @ sum(np.outer(s, s) for s in scores) @ bread).item()

    products = [residuals[i] * residuals[j] for own in members for i in own for j in own if i != j]
    correlation = min(1.0, max(0.0, np.mean(products) / np.mean(residuals**2)))
    assert (correlation > 0.3) == (alike > 0)
    working = np.eye(n)
    for own in members:
        working[np.ix_(own, own)] += correlation * (1 - np.eye(len(own)))
    spectrum = np.linalg.eigvalsh(np.hstack(columns).T @ working @ np.hstack(columns))
    df = spectrum.sum() ** 2 / (spectrum**2).sum()
    assert df < len(members) - 1

    half = stats.t.ppf(0.975, df) * variance**0.5
    assert paired_difference(a, b, clusters).interval == pytest.approx((d.mean() - half, d.mean() + half))


def test_the_interval_of_a_mean_is_that_of_the_score_test():
    """Wilson's bounds: the shares whose distance to the mean is t standard errors *at that share*."""
    scores = np.repeat([1.0, 1.0, 0.0, 1.0], 25)
    found = mean_score(scores, range(100))
    design_effect = (scores.var(ddof=1) / 100) / (0.75 * 0.25 / 100)
    for bound in found.interval:
        error = (bound * (1 - bound) / 100 * design_effect) ** 0.5
        assert abs(found.value - bound) / error == pytest.approx(stats.t.ppf(0.975, 99))
    assert found.interval == pytest.approx(recall_interval(75, 100), abs=0.003)


def test_more_questions_about_the_same_pictures_do_not_shrink_the_interval():
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 2, 60)
    once = mean_score(scores, range(60))
    often = mean_score(np.repeat(scores, 10), np.repeat(np.arange(60), 10).tolist())
    assert often.interval == pytest.approx(once.interval)
    assert (often.n, often.n_clusters) == (600, 60)


def test_recall_interval_is_wilsons():
    p, n, z = 0.1, 200, stats.norm.ppf(0.975)
    centre, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5,
    )
    assert recall_interval(20, 200) == pytest.approx((centre - half, centre + half))
    assert recall_interval(0, 200)[0] == 0 < recall_interval(0, 200)[1]


# -------------------------------------------------------------------------------------------------- p-values


def test_sign_flip_p_equals_enumeration():
    rng = np.random.default_rng(4)
    for unit in (1, 3, 10, 30):
        for _ in range(20):
            sums = rng.integers(-4, 5, rng.integers(1, 11)) / unit
            flipped = [abs(np.dot(signs, sums)) for signs in itertools.product((1, -1), repeat=len(sums))]
            expected = np.mean(np.array(flipped) >= abs(sums.sum()) - 1e-9)
            assert sign_flip_p(sums) == pytest.approx(expected, abs=1e-12), (unit, sums)


def test_sign_flip_p_equals_scipys_permutation_test():
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 4, (2, 11)).astype(float)
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip_p(a - b) == pytest.approx(expected.pvalue)


def test_with_single_questions_it_is_mcnemars_exact_test():
    a, b = np.zeros(300), np.zeros(300)
    a[:31], b[31:48] = 1, 1  # a alone right on 31, b alone on 17
    expected = stats.binomtest(31, 48).pvalue
    assert paired_difference(a, b, range(300)).p_value == pytest.approx(expected)
    assert paired_difference(b, a, range(300)).p_value == pytest.approx(expected)


def test_sign_flip_p_of_many_soft_scores_agrees_with_drawn_signs():
    rng = np.random.default_rng(6)
    sums = (
        rng.choice([0, 0.3, 0.6, 0.9, 1.0], 3000)
        - rng.choice([0, 0.3, 0.6, 0.9, 1.0], 3000)
        + 0.1 * (rng.random(3000) < 0.2)
    )
    signs = rng.choice([-1.0, 1.0], (4000, 3000))
    drawn = np.mean(np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9)
    assert sign_flip_p(sums) == pytest.approx(drawn, abs=4 * (0.25 / 4000) ** 0.5)


def test_the_smallest_p_is_that_of_two_patterns():
    assert sign_flip_p(np.ones(6)) == pytest.approx(2 / 2**6)
    assert sign_flip_p(np.ones(60)) == pytest.approx(2.0**-59)


def test_holm_equals_its_definition():
    p_values = [0.01, 0.04, 0.03, 0.005, 0.5]
    order = sorted(range(5), key=p_values.__getitem__)
    expected = {}
    for place, index in enumerate(order):
        expected[index] = min(1.0, max((5 - i) * p_values[order[i]] for i in range(place + 1)))
    assert holm(p_values) == pytest.approx([expected[i] for i in range(5)])
    assert holm([]) == []


# ------------------------------------------------------------------------------------------------ degenerate


def test_no_differing_question_is_no_proof_of_equality():
    found = paired_difference([1, 0, 1, 1] * 15, [1, 0, 1, 1] * 15, range(60))
    assert (found.difference, found.p_value) == (0.0, 1.0)
    low, high = found.interval
    assert low == -high
    assert (1 - high) ** 60 == pytest.approx(0.05)  # a larger share of differing questions would have shown itself


def test_all_answers_right_leaves_an_interval():
    found = mean_score([1.0] * 90, [i // 3 for i in range(90)])
    assert found.value == found.interval[1] == 1.0
    assert found.interval[0] ** 30 == pytest.approx(0.05)  # 30 pictures, not 90 questions


def test_one_cluster_tells_nothing():
    assert mean_score([1, 0, 1], ["p"] * 3).interval == (0.0, 1.0)
    found = paired_difference([1, 1, 1], [0, 0, 1], ["p"] * 3)
    assert found.interval == pytest.approx((-1, 1))
    assert found.p_value == 1.0


def test_differences_that_cancel_in_each_picture():
    """Always "yes" against always "no" on pairs of a yes and a no question."""
    yes, no = [1, 0] * 40, [0, 1] * 40
    found = paired_difference(yes, no, [i // 2 for i in range(80)])
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert found.interval[0] < 0 < found.interval[1]


def test_decimals_that_only_seem_to_vary():
    found = paired_difference([0.1 + 0.2] * 30, [0.3] * 30, range(30))
    assert found.p_value == 1.0
    assert found.interval[0] < 0 < found.interval[1]


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="3 and 2"):
        mean_score([1.0, 0.0], [1, 2, 3])
    with pytest.raises(ValueError):
        mean_score([], [])


# ------------------------------------------------------------------------------------------------ simulation

SIZES = {
    "single questions": np.full(200, 1),
    "pairs": np.full(120, 2),
    "six a picture": np.full(40, 6),
    "uneven": np.repeat([1, 4, 12, 20], [60, 20, 6, 2]),
    "few and uneven": np.tile([3, 6, 9, 12, 24], 5),
}


@pytest.mark.parametrize("design", SIZES)
@pytest.mark.parametrize("share, gain", [(0.6, 0.05), (0.8, 0.05), (0.9, 0.03)])
def test_intervals_cover_and_the_test_keeps_its_level(design: str, share: float, gain: float):
    """Two-level: pictures differ in how hard they are, so answers about one go together (correlation 0.2).

    a and b are right on `share` of the questions, c on `gain` more than a.
    """
    rng = np.random.default_rng(20)
    sizes, draws = SIZES[design], 1500
    clusters = np.repeat(np.arange(len(sizes)), sizes).tolist()
    covered_mean = covered_null = covered_gain = 0
    p_values = np.empty(draws)
    for draw in range(draws):
        easy = np.repeat(rng.beta(4 * share, 4 * (1 - share), len(sizes)), sizes)
        a, b = (rng.random((2, len(easy))) < easy).astype(float)
        c = np.where(rng.random(len(easy)) < gain / (1 - share), 1.0, a)  # right on that share of what a gets wrong
        low, high = mean_score(a, clusters).interval
        covered_mean += low <= share <= high
        null = paired_difference(a, b, clusters)
        covered_null += null.interval[0] <= 0 <= null.interval[1]
        p_values[draw] = null.p_value
        low, high = paired_difference(c, b, clusters).interval
        covered_gain += low <= gain <= high
    for covered in (covered_mean, covered_null, covered_gain):
        assert 0.93 <= covered / draws <= 0.97, (covered_mean / draws, covered_null / draws, covered_gain / draws)
    for alpha in (0.1, 0.05, 0.01):
        assert np.mean(p_values <= alpha) <= alpha + 3 * (alpha * (1 - alpha) / draws) ** 0.5


def test_the_level_holds_where_models_hardly_differ_and_a_t_test_fails():
    rng = np.random.default_rng(21)
    draws, exact, t_test = 3000, 0, 0
    for _ in range(draws):
        d = np.zeros(200)
        d[:8] = rng.choice([-1.0, 1.0], 8)  # 8 of 200 questions answered differently, either way alike
        exact += sign_flip_p(d) <= 0.05
        t_test += stats.ttest_1samp(d, 0).pvalue <= 0.05
    assert exact / draws <= 0.05
    assert t_test / draws > 0.06
