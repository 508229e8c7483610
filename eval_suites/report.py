"""Towers side by side: a table in the terminal, report.json, and report.html, one page that needs nothing else."""

import csv
import io
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
    STANDARDISED,
    Report,
    analyse,
    between,
    first_trainings,
    p_text,
    percent,
    points,
    short_value,
    verdicts,
)
from eval_suites.fairness import settings_table
from eval_suites.judge import check_judged
from eval_suites.records import Entry, check_same_questions, read_run

__all__ = ["Entry", "Report", "compare", "print_report"]


def compare(
    entries: Sequence[Entry],
    out: Path,
    data: Path | None = None,
    seconds: Mapping[str, float] | None = None,
    waived: Sequence[str] = (),
) -> Report:
    """Compare the runs of `entries`; print tables; write report.html, report.json, report.csv and report.tex into `out`.

    Args:
        data: folder that holds the benchmarks' files (`lmms-lab-encoder/…`), where the page's pictures come from; None: none.
        seconds: what stages took on the clock, where that is known (the demo's, the drawing of the world among them).
        waived: settings that may differ although they are not the towers' nature (see `eval_suites.fairness`).

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
    report = analyse(runs, seconds or {}, settings)
    write_bytes(out / "report.html", page.render(report, runs, patterns).encode())
    write_json(out / "report.json", report.to_dict())
    write_bytes(out / "report.csv", as_csv(report).encode())
    write_bytes(out / "report.tex", as_latex(report).encode())
    print_report(report, Console())
    return report


def as_csv(report: Report) -> str:
    """A line for each figure of a tower and for each comparison."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["benchmark", "metric", "a", "b", "value", "low", "high", "p_value", "n", "n_seeds", "inference"])
    for name, figures in report.towers.items():
        for benchmark, own in figures["benchmarks"].items():
            writer.writerow([benchmark, ACCURACY, name, "", own[ACCURACY], *own["interval"], "", own["n"],
                             len(figures["mllm"]["seeds"]), ""])  # fmt: skip
    for row in (*report.comparisons, *report.controls):
        writer.writerow([row.benchmark, row.metric, row.a, row.b, row.difference, *row.interval, row.p_value, row.n,
                         row.n_seeds, row.inference])  # fmt: skip
    return file.getvalue()


def as_latex(report: Report) -> str:
    """Towers × benchmarks in % with intervals, for `\\usepackage{booktabs}`; a star where a difference to the first tower holds."""
    names = list(report.towers)
    benchmarks = list(report.towers[names[0]]["benchmarks"])
    marks = zip(report.comparisons, verdicts(report.comparisons), strict=True)
    starred = {
        (row.benchmark, row.b) for row, better in marks if better and row.a == names[0] and row.metric == ACCURACY
    }
    lines = [f"\\begin{{tabular}}{{l{'c' * len(benchmarks)}}}", "\\toprule"]
    lines += [" & ".join(["", *map(_tex, benchmarks)]) + r" \\", "\\midrule"]
    for name, figures in report.towers.items():
        cells = []
        for benchmark, own in figures["benchmarks"].items():
            star = "$^*$" if (benchmark, name) in starred else ""
            interval = between(own["interval"], signed=False)
            cells.append(f"{percent(own[ACCURACY])}{star} {{\\scriptsize {interval}}}")
        lines.append(" & ".join([_tex(name), *cells]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)


WHY = {"nature": "the towers' nature", "otherwise": "waived"}


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

    differing = [setting for setting in report.settings if setting.kind != "identical"]
    identical = len(report.settings) - len(differing)
    show(
        f"What differs; {identical} other settings are identical",
        ["", *names, "why"],
        [
            [setting.key, *(short_value(setting.values[name]) for name in names), WHY[setting.kind]]
            for setting in differing
        ],
    )
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
        if row.metric in (STANDARDISED, ACCURACY):
            means = [
                percent(report.towers[name]["benchmarks"][row.benchmark][ACCURACY]) if row.metric == ACCURACY else ""
                for name in names
            ]
            pair = [f"{row.a} − {row.b}"] if len(names) > 2 else []
            difference = [
                *pair,
                f"{points(row.difference)} {between(row.interval)}",
                p_text(row.p_value).removeprefix("= "),
            ]
            answered.append([row.benchmark, str(row.n), *means, *difference, better or "?"])
    pair = ["pair"] if len(names) > 2 else []
    columns = ["", "n", *names, *pair, "difference", "p", "better"]
    title = (
        "Accuracy of their LLaVAs in %, paired differences with 95 % intervals (suite: in % of a standard deviation)"
    )
    show(title, columns, answered)

    lost: dict[tuple[str, str], list[str]] = {}
    for row in report.controls:
        lost.setdefault((row.benchmark, row.a), []).append(f"{points(row.difference)} {between(row.interval)}")
    if lost:
        show(
            "Accuracy with the right pictures minus that with blank or shuffled ones, in points",
            ["", "model", *(f"− {pictures}" for pictures in CONTROLS)],
            [[benchmark, name, *cells] for (benchmark, name), cells in lost.items()],
        )
    for sentence in report.findings:
        console.print(f"• {sentence}", highlight=False, markup=False)
