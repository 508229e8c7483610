"""Wins and losses by category: where inside a benchmark two towers differ.

A look around and no declared test: a benchmark has up to dozens of categories, and some always differ by chance. So nobody wins
one unless Holm's adjusted p over the categories of the same benchmark, as a family of their own, is at most 5 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from eval_suites.benchmarks import Suite
from eval_suites.records import Key, Record, Run
from eval_suites.statistics import Inference, better_of, holm, paired_answers, paired_difference


@dataclass(frozen=True)
class Category:
    """Two towers' models on the questions of one category. A question counts as right from a score of one half on."""

    benchmark: str
    category: str
    a: str
    b: str
    n_samples: int  # questions
    n_clusters: int  # pictures
    accuracy: tuple[float, float]  # mean score of a and of b
    wins: float  # questions that a alone got right; of several trainings, the mean
    losses: float  # that b alone got right
    difference: float  # mean score of a minus that of b
    interval: tuple[float, float]
    p_value: float
    adjusted_p: float  # Holm's, over the categories of this benchmark for these two towers
    better: str | None  # None: cannot be told
    n_seeds: int
    inference: Inference


def categories_of(records: Mapping[Key, Record], suite: Suite) -> dict[str, dict[str, list[Key]]]:
    """The questions of each category, by benchmark, of the benchmarks that have two categories or more.

    A judged question may ask for several capabilities at once (MM-Vet's `rec,ocr`) and counts for each.
    """
    found: dict[str, dict[str, list[Key]]] = {}
    for (task, doc_id), record in records.items():
        several = task in suite.tasks and suite.tasks[task].judge
        for name in record.category.split(",") if several else [record.category]:
            if name.strip():
                found.setdefault(task, {}).setdefault(name.strip(), []).append((task, doc_id))
    return {task: own for task, own in found.items() if len(own) > 1}


def by_category(a: Sequence[Run], b: Sequence[Run], questions: Mapping[str, Mapping[str, list[Key]]]) -> list[Category]:
    """Two towers' trainings, in the order of their seeds, on every category of `questions`."""
    return [row for task, own in questions.items() for row in _of_benchmark(a, b, task, own)]


def _of_benchmark(a: Sequence[Run], b: Sequence[Run], task: str, questions: Mapping[str, list[Key]]) -> list[Category]:
    rows = [_row(a, b, task, category, keys) for category, keys in questions.items()]
    adjusted = holm([row.p_value for row in rows])
    return [
        replace(row, adjusted_p=p, better=better_of(row.a, row.b, row.difference, p, row.interval))
        for row, p in zip(rows, adjusted, strict=True)
    ]


def _row(a: Sequence[Run], b: Sequence[Run], task: str, category: str, keys: Sequence[Key]) -> Category:
    first, second = ([{key: run.records["real"][key] for key in keys} for run in own] for own in (a, b))
    scores = paired_answers(first, second)[task]
    found = paired_difference(scores.a, scores.b, scores.clusters)
    right = [(one[key].right, other[key].right) for one, other in zip(first, second, strict=True) for key in keys]
    return Category(
        task, category, a[0].name, b[0].name, found.n_samples, found.n_clusters,
        (float(scores.a.mean()), float(scores.b.mean())), right.count((True, False)) / len(a),
        right.count((False, True)) / len(a), found.difference, found.interval, found.p_value, found.p_value, None,
        found.n_seeds, found.inference,
    )  # fmt: skip
