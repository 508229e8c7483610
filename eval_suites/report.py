"""Towers side by side: a table in the terminal, report.json, and report.html, one page that needs nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clips_core.errors import InputError
from clips_core.folders import write_bytes, write_json
from eval_suites import page, samples
from eval_suites.comparison import (
    ACCURACY,
    CONTROLS,
    DIRECTIONS,
    RECALLS,
    Report,
    analyse,
    between,
    p_text,
    percent,
    points,
    verdicts,
)
from eval_suites.records import Entry, check_same_questions, read_run

__all__ = ["Entry", "Report", "compare", "print_report"]


def compare(entries: Sequence[Entry], out: Path, data: Path, seconds: Mapping[str, float] | None = None) -> Report:
    """Compare the runs of `entries`; print a table; write `out`/report.json and `out`/report.html.

    Args:
        data: folder that holds the benchmarks' files (`lmms-lab-encoder/…`), where the page's pictures come from.
        seconds: what stages took on the clock, where that is known (the demo's, the drawing of the world among them).

    Raises:
        InputError: if a folder is missing, unfinished or another stage's, a file is malformed, or two runs did not answer
            the same questions (naming the first that differs).
    """
    if len(entries) < 2 or len({entry.name for entry in entries}) < len(entries):
        raise InputError(f"a comparison needs two or more towers of different names, not {[e.name for e in entries]}")
    runs = [read_run(entry) for entry in entries]
    check_same_questions(runs)
    patterns = samples.choose([run.records["real"] for run in runs], runs[0].suite, data)
    report = analyse(runs, seconds or {})
    write_bytes(out / "report.html", page.render(report, runs, patterns).encode())
    write_json(out / "report.json", report.to_dict())
    print_report(report, Console())
    return report


def print_report(report: Report, console: Console) -> None:
    """Towers, answers and controls as tables, then the findings."""
    names = list(report.towers)

    def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for column in columns:
            table.add_column(Text(column), justify="left" if column in ("", "tower", "model") else "right")
        for row in rows:
            table.add_row(*map(Text, row))  # Text: brackets in names and intervals are no markup
        console.print(table)

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
    show("Retrieval among held-out pictures, in %", columns, recalls)

    answered = []
    for row, better in zip(report.comparisons, verdicts(report.comparisons), strict=True):
        if row.metric == ACCURACY:
            means = [percent(report.towers[name]["benchmarks"][row.benchmark][ACCURACY]) for name in names]
            pair = [f"{row.a} − {row.b}"] if len(names) > 2 else []
            difference = [
                *pair,
                f"{points(row.difference)} {between(row.interval)}",
                p_text(row.p_value).removeprefix("= "),
            ]
            answered.append([row.benchmark, str(row.n), *means, *difference, better or "?"])
    pair = ["pair"] if len(names) > 2 else []
    columns = ["", "n", *names, *pair, "difference", "p", "better"]
    show("Accuracy of their LLaVAs in %, paired differences with 95 % intervals", columns, answered)

    lost: dict[tuple[str, str], list[str]] = {}
    for row in report.controls:
        lost.setdefault((row.benchmark, row.a), []).append(f"{points(row.difference)} {between(row.interval)}")
    show(
        "Accuracy with the right pictures minus that with blank or shuffled ones, in points",
        ["", "model", *(f"− {pictures}" for pictures in CONTROLS)],
        [[benchmark, name, *cells] for (benchmark, name), cells in lost.items()],
    )
    for sentence in report.findings:
        console.print(f"• {sentence}", highlight=False, markup=False)
