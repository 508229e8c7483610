"""Wins and losses by category against plain loops over the records."""

from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from clips_core.config import to_dict
from eval_suites.benchmarks import BenchmarkTask, Suite
from eval_suites.categories import Category, by_category, categories_of
from eval_suites.records import Entry, Key, Record, Run
from eval_suites.statistics import paired_difference

SUITE = Suite("mine", {"mme": BenchmarkTask(), "gqa": BenchmarkTask(), "mmvet": BenchmarkTask(judge=True)})
NAMES = ("count", "color", "position", "OCR")


def records(seed: int, skill: dict[str, float], n: int = 160) -> dict[Key, Record]:
    """`n` questions of MME, two a picture, of four categories; GQA, of none; MM-Vet, of one or two capabilities."""
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(n):
        name = NAMES[i // 2 % 4]
        score = float(rng.random() < skill.get(name, 0.6))
        found["mme", i] = Record("mme", i, f"{name} {i // 2}", name, "?", "yes", "yes", score)
    for i in range(20):
        found["gqa", i] = Record("gqa", i, f"g{i}", "", "?", "red", "red", float(rng.random() < 0.5))
    for i in range(40):
        name = ("rec", "ocr, rec", "ocr,math")[i % 3]
        found["mmvet", i] = Record("mmvet", i, f"v{i}", name, "?", "a cat", "cat", round(float(rng.random()), 1))
    return found


def runs(name: str, own: list[dict[Key, Record]]) -> list[Run]:
    manifest = {"config": {"suite": to_dict(SUITE)}}
    return [
        Run(Entry(name, None, None, None, Path(name), seed=seed), {"real": manifest}, None, {"real": answers}, {}, {})
        for seed, answers in enumerate(own)
    ]


def compared(seeds: int) -> tuple[list[Run], list[Run], list[Category]]:
    a = runs("a", [records(seed, {"count": 0.9}) for seed in range(seeds)])
    b = runs("b", [records(100 + seed, {"count": 0.3}) for seed in range(seeds)])
    return a, b, by_category(a, b, categories_of(a[0].records["real"], SUITE))


def test_categories_are_those_of_the_records() -> None:
    own = records(0, {})
    found = categories_of(own, SUITE)
    assert {task: list(names) for task, names in found.items()} == {
        "mme": ["count", "color", "position", "OCR"],  # as they come
        "mmvet": ["rec", "ocr", "math"],  # each capability by itself
    }
    assert found["mme"]["color"] == [key for key, record in own.items() if record.category == "color"]
    assert found["mmvet"]["rec"] == [("mmvet", i) for i in range(40) if i % 3 != 2]
    # Of a benchmark that no judge scores, a comma is part of a category's name.
    odd = {("gqa", i): Record("gqa", i, str(i), name, "?", "", "", 1.0) for i, name in enumerate(["food, drink", "x"])}
    assert list(categories_of(odd, SUITE)["gqa"]) == ["food, drink", "x"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_wins_and_losses_are_those_of_a_plain_loop(seeds: int) -> None:
    a, b, rows = compared(seeds)
    assert [(row.benchmark, row.category) for row in rows] == [
        *(("mme", name) for name in NAMES), *(("mmvet", name) for name in ("rec", "ocr", "math")),
    ]  # fmt: skip
    for row in rows:
        wins = losses = n = 0
        totals = [0.0, 0.0]
        for first, second in zip(a, b, strict=True):
            for key, record in first.records["real"].items():
                labels = [part.strip() for part in record.category.split(",")]
                if key[0] != row.benchmark or row.category not in labels:
                    continue
                other = second.records["real"][key]
                n += 1
                wins += record.score >= 0.5 and not other.score >= 0.5
                losses += other.score >= 0.5 and not record.score >= 0.5
                totals[0] += record.score
                totals[1] += other.score
        assert row.n_samples == n / seeds and row.n_seeds == seeds
        assert (row.wins, row.losses) == (wins / seeds, losses / seeds)
        assert row.accuracy == pytest.approx((totals[0] / n, totals[1] / n))
        assert row.difference == pytest.approx((totals[0] - totals[1]) / n)
        if row.benchmark == "mme":  # right or wrong: the difference is that of wins and losses
            assert row.difference == pytest.approx((row.wins - row.losses) / row.n_samples)
            assert row.n_clusters == row.n_samples / 2


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_and_tests_are_those_of_the_same_rows(seeds: int) -> None:
    a, b, rows = compared(seeds)
    keys = [("mme", i) for i in range(160) if a[0].records["real"]["mme", i].category == "color"]
    scores = [[[run.records["real"][key].score for key in keys] for run in own] for own in (a, b)]
    expected = paired_difference(*scores, [a[0].records["real"][key].cluster for key in keys])
    color = next(row for row in rows if row.category == "color")
    assert (color.interval, color.p_value) == (expected.interval, expected.p_value)
    assert (color.inference, color.n_clusters) == (expected.inference, expected.n_clusters)


def test_a_benchmarks_categories_are_one_family() -> None:
    *_, rows = compared(1)
    for task in ("mme", "mmvet"):
        own = [row for row in rows if row.benchmark == task]
        adjusted = multipletests([row.p_value for row in own], method="holm")[1]
        assert [row.adjusted_p for row in own] == pytest.approx(list(adjusted))
    count = rows[0]
    assert (count.better, count.adjusted_p <= 0.05) == ("a", True)
    for row in rows:
        told = row.adjusted_p <= 0.05 and not row.interval[0] <= 0 <= row.interval[1]
        assert row.better == ((row.a if row.difference > 0 else row.b) if told else None)


def test_a_small_p_alone_names_nobody() -> None:
    """Of 30 categories alike, one differs by a p of 0.016: on its own a finding, among 30 none."""
    names = [f"subject {i}" for i in range(30)]
    right = {
        name: {("mme", 8 * j + i): Record("mme", 8 * j + i, f"{j} {i}", name, "?", "", "", float(name != "subject 3" or i > 6))
               for i in range(8)}
        for j, name in enumerate(names)
    }  # fmt: skip
    first = {key: record for own in right.values() for key, record in own.items()}
    second = {
        key: Record(r.task, r.doc_id, r.cluster, r.category, r.question, "", "", 1.0 if r.category == "subject 3" else r.score)
        for key, r in first.items()
    }  # fmt: skip
    a, b = runs("a", [first]), runs("b", [second])
    rows = by_category(a, b, categories_of(first, SUITE))
    differing = next(row for row in rows if row.category == "subject 3")
    assert differing.p_value == pytest.approx(2 / 2**7) and (differing.wins, differing.losses) == (0, 7)
    assert differing.adjusted_p == pytest.approx(30 * 2 / 2**7) and differing.better is None
