"""Towers side by side: a table in the terminal, report.json, and report.html, one page that needs nothing else."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clips_core.errors import InputError
from clips_core.folders import write_bytes, write_json
from eval_suites import anchor, page, samples
from eval_suites.comparison import (
    ACCURACY,
    CONTROLS,
    DIRECTIONS,
    MME_POINTS,
    RECALLS,
    STANDARDISED,
    Report,
    amount,
    analyse,
    between,
    by_tower,
    first_trainings,
    p_text,
    percent,
    points,
    short_value,
    span,
)
from eval_suites.fairness import settings_table
from eval_suites.judge import check_judged
from eval_suites.page import count_text
from eval_suites.published import beside, published_table
from eval_suites.records import Entry, check_same_questions, read_run
from eval_suites.terminal import table

__all__ = ["Entry", "Report", "compare", "print_report"]


def compare(
    entries: Sequence[Entry],
    out: Path,
    data: Path | None = None,
    seconds: Mapping[str, float] | None = None,
    waived: Sequence[str] = (),
    reference: Path | None = None,
    with_aims: bool = False,
) -> Report:
    """Compare the runs of `entries`; print tables; write report.html, .json, .csv and .tex and categories.csv into `out`.

    Args:
        data: folder that holds the benchmarks' files (`lmms-lab-encoder/…`), where the page's pictures come from; None: none.
        seconds: what stages took on the clock, where that is known (the demo's, the drawing of the world among them).
        waived: settings that may differ although they are not the towers' nature (see `eval_suites.fairness`).
        reference: folder of a `study reference`, the anchor; None: none was run.
        with_aims: say whether the demo's aims were met.

    Raises:
        InputError: if a folder is missing, unfinished or another stage's, a file is malformed, two runs did not answer
            the same questions (naming the first that differs), or not only the towers differ.
    """
    if len({entry.name for entry in entries}) < 2:
        raise InputError(f"a comparison needs two or more towers of different names, not {[e.name for e in entries]}")
    runs = [read_run(entry) for entry in entries]
    check_judged({str(getattr(run.entry, shown)): run.manifests[shown] for run in runs for shown in run.records})
    check_same_questions(runs)
    settings = settings_table(runs, waived)
    patterns = samples.choose([run.records["real"] for run in first_trainings(runs)], runs[0].suite, data)
    report = analyse(runs, seconds or {}, settings, with_aims)
    ours = None if reference is None else anchor.read_anchor(reference)
    report = replace(report, published=beside(by_tower(runs)), anchor=ours, anchored=anchor.sentences(ours, runs))
    write_bytes(out / "report.html", page.render(report, runs, patterns).encode())
    write_json(out / "report.json", report.to_dict())
    write_bytes(out / "report.csv", as_csv(report).encode())
    write_bytes(out / "categories.csv", categories_csv(report).encode())
    write_bytes(out / "report.tex", as_latex(report).encode())
    print_report(report, Console())
    return report


def as_csv(report: Report) -> str:
    """A line for each figure of a tower and for each comparison."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["benchmark", "metric", "a", "b", "value", "low", "high", "p_value", "adjusted_p", "better",
                     "n_samples", "n_clusters", "n_seeds", "inference"])  # fmt: skip
    for name, figures in report.towers.items():
        for benchmark, own in figures["benchmarks"].items():
            values = {ACCURACY: (own[ACCURACY], own)} | {
                metric: (found["value"], found) for metric, found in own["points"].items()
            }
            for metric, (value, found) in values.items():
                writer.writerow([benchmark, metric, name, "", value, *found["interval"], "", "", "", found["n_samples"],
                                 found["n_clusters"], found["n_seeds"], found["inference"]])  # fmt: skip
    for row in (*report.comparisons, *report.controls):
        writer.writerow([row.benchmark, row.metric, row.a, row.b, row.difference, *row.interval, row.p_value,
                         row.adjusted_p, row.better or "", row.n_samples, row.n_clusters, row.n_seeds,
                         row.inference])  # fmt: skip
    return file.getvalue()


def categories_csv(report: Report) -> str:
    """A line for each category of a benchmark and pair of towers."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["benchmark", "category", "a", "b", "n_samples", "n_clusters", "accuracy_a", "accuracy_b", "wins", "losses",
                     "difference", "low", "high", "p_value", "adjusted_p", "better", "n_seeds", "inference"])  # fmt: skip
    for row in report.categories:
        writer.writerow([row.benchmark, row.category, row.a, row.b, row.n_samples, row.n_clusters, *row.accuracy, row.wins,
                         row.losses, row.difference, *row.interval, row.p_value, row.adjusted_p, row.better or "", row.n_seeds,
                         row.inference])  # fmt: skip
    return file.getvalue()


def as_latex(report: Report) -> str:
    """Towers × benchmarks in % with intervals, MME's sums in points; for `\\usepackage{booktabs}`.

    A star stands where a difference to the first tower holds.
    """
    names = list(report.towers)
    columns = [
        (benchmark, metric)
        for benchmark, own in report.towers[names[0]]["benchmarks"].items()
        for metric in (ACCURACY, *own["points"])
    ]
    starred = {(row.benchmark, row.metric, row.b) for row in report.comparisons if row.better and row.a == names[0]}
    heads = [_tex(benchmark if metric == ACCURACY else metric) for benchmark, metric in columns]
    lines = [f"\\begin{{tabular}}{{l{'c' * len(columns)}}}", "\\toprule"]
    lines += [" & ".join(["", *heads]) + r" \\", "\\midrule"]
    for name, figures in report.towers.items():
        cells = []
        for benchmark, metric in columns:
            own = figures["benchmarks"][benchmark]
            star = "$^*$" if (benchmark, metric, name) in starred else ""
            if metric == ACCURACY:
                value, interval = percent(own[ACCURACY]), between(own["interval"], signed=False)
            else:
                value, (low, high) = f"{own['points'][metric]['value']:.1f}", own["points"][metric]["interval"]
                interval = f"[{low:.1f}, {high:.1f}]"
            cells.append(f"{value}{star} {{\\scriptsize {interval}}}")
        lines.append(" & ".join([_tex(name), *cells]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)


MOST_CATEGORIES = 5  # in the terminal
WHY = {"nature": "the towers' nature", "otherwise": "waived"}


def print_report(report: Report, console: Console) -> None:
    """Towers, answers and controls as tables, then the findings."""
    names = list(report.towers)

    differing = [setting for setting in report.settings if setting.kind != "identical"]
    identical = len(report.settings) - len(differing)
    rows = [
        [setting.key, *(short_value(setting.values[name]) for name in names), WHY[setting.kind]]
        for setting in differing
    ]
    console.print(table(f"What differs; {identical} other settings are identical", ["", *names, "why"], rows))
    measured = {name: figures["zero_shot"] for name, figures in report.towers.items() if figures["zero_shot"]}
    recalls = [
        [words, name, percent(own[way]["R@1"]), between(own["intervals"][way]["R@1"], signed=False)]
        + [percent(own[way][recall]) for recall in RECALLS[1:]]
        for way, words in DIRECTIONS.items()
        for name, own in measured.items()
    ]
    for own in list(measured.values())[:1]:
        recalls.append(
            ["chance", "", percent(own["chance"]["R@1"]), "", *(percent(own["chance"][r]) for r in RECALLS[1:])]
        )
    columns = ["", "tower", "R@1", "95 % interval", *RECALLS[1:]]
    console.print(table("Retrieval among held-out pictures, in %", columns, recalls, words=2))

    answered = []
    for row in report.comparisons:
        if row.metric in (STANDARDISED, ACCURACY, *MME_POINTS):
            means = [_mean(report.towers[name]["benchmarks"].get(row.benchmark), row.metric) for name in names]
            pair = [f"{row.a} − {row.b}"] if len(names) > 2 else []
            difference = [
                *pair,
                f"{amount(row)} {span(row)}",
                p_text(row.p_value).removeprefix("= "),
            ]
            what = f"{row.metric}, points" if row.metric in MME_POINTS else row.benchmark
            answered.append([what, str(row.n_samples), *means, *difference, row.better or "?"])
    pair = ["pair"] if len(names) > 2 else []
    columns = ["", "n", *names, *pair, "difference", "p", "better"]
    title = (
        "Accuracy of their LLaVAs in %, paired differences with 95 % intervals (suite: in % of a standard deviation)"
    )
    console.print(table(title, columns, answered))
    if report.categories:
        console.print(_categories_table(report))

    lost: dict[tuple[str, str], dict[str, str]] = {}
    for row in report.controls:
        pictures = row.b.removeprefix(f"{row.a}, ")
        lost.setdefault((row.benchmark, row.a), {})[pictures] = f"{points(row.difference)} {between(row.interval)}"
    if lost:
        asked = [pictures for pictures in CONTROLS if any(pictures in cells for cells in lost.values())]
        title = f"Accuracy with the right pictures minus that with {' or '.join(asked)} ones, in points"
        rows = [[*of, *(cells.get(pictures, "") for pictures in asked)] for of, cells in lost.items()]
        columns = ["", "model", *(f"− {pictures}" for pictures in asked)]
        console.print(table(title, columns, rows, words=2))
    for made in (published_table(report.published), anchor.anchor_table(report.anchor)):
        if made is not None:
            console.print(made)
    for sentence in (*report.findings, *report.published.said, *report.anchored):
        console.print(f"• {sentence}", highlight=False, markup=False)


def _mean(figures: Mapping[str, Any] | None, metric: str) -> str:
    """A tower's own figure beside a difference; none stands beside that of the suite."""
    if figures is None or metric == STANDARDISED:
        return ""
    return percent(figures[ACCURACY]) if metric == ACCURACY else f"{figures['points'][metric]['value']:.1f}"


def _categories_table(report: Report) -> Table:
    """The categories that differ most surely; all are on the page."""
    several = len(report.towers) > 2
    shown = sorted(report.categories, key=lambda row: (row.p_value, -abs(row.difference)))[:MOST_CATEGORIES]
    rows = [
        [
            f"{row.benchmark}: {row.category}", *([f"{row.a} − {row.b}"] if several else []), str(row.n_samples),
            count_text(row.wins), count_text(row.losses), points(row.difference), p_text(row.adjusted_p).removeprefix("= "),
        ]
        for row in shown
    ]  # fmt: skip
    title = (
        f"Questions that one alone got right: {len(shown)} of {len(report.categories)} categories, for a look around"
    )
    alone = ["first alone", "second alone"] if several else [f"{name} alone" for name in report.towers]
    columns = ["", *(["pair"] if several else []), "n", *alone, "difference", "p (Holm)"]
    return table(title, columns, rows, words=2 if several else 1)
