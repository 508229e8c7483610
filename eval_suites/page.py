"""report.html: one page without script or outside resource, light and dark, for a screen of any width."""

import json
from collections.abc import Callable, Sequence
from math import ceil, isfinite
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eval_suites import comparison
from eval_suites.asked import batch_words
from eval_suites.categories import Category
from eval_suites.charts import Line, line_chart, short
from eval_suites.comparison import (
    ACCURACY,
    ALL,
    DIRECTIONS,
    MME_POINTS,
    RECALLS,
    SUITE,
    YES_NO,
    Comparison,
    Report,
)
from eval_suites.records import Run
from eval_suites.samples import Pattern

LABELS = {
    "pope": "POPE",
    "mme": "MME",
    "gqa": "GQA",
    "textvqa_val": "TextVQA",
    "textvqa_val_ocr": "TextVQA with OCR tokens",
    "mmmu_val": "MMMU",
    "mmvet": "MM-Vet",
    "chartqa": "ChartQA",
    "nocaps_val": "NoCaps",
    "seedbench": "SEED-Bench",
    "scienceqa_img": "ScienceQA",
    "ocrbench": "OCRBench",
    ALL: "All questions",
    YES_NO: "Yes/no questions",
}
ASKED = {  # what a benchmark asks, for those who do not know its name
    ALL: "pooled",
    YES_NO: "pooled",
    "pope": "is this object in the picture?",
    "mme": "pairs of a yes and a no question",
    "gqa": "composition: objects, colours, places",
    "textvqa_val": "reading a printed word",
}
STAGES = {
    "tower": "pretraining the tower",
    "align": "stage 1, projector",
    "tune": "stage 2, LLM and projector",
    "real": "evaluation",
    "blank": "evaluation, blank pictures",
    "shuffled": "evaluation, shuffled pictures",
}
FEW_CATEGORIES = 6  # of a benchmark, that are shown without a click
LONGEST_WHISKER = 1.5  # of the longest bar of a benchmark's categories; a longer one goes on beyond the axis
COLOURS = 6  # towers that the style sheet tells apart


def environment() -> Environment:
    """The template engine of all pages, which escapes every text, with the filters for figures."""
    template = Environment(
        loader=PackageLoader("eval_suites"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template.filters |= {
        "percent": comparison.percent,
        "points": comparison.points,
        "between": comparison.between,
        "amount": comparison.amount,
        "span": comparison.span,
        "p_text": comparison.p_text,
        "duration": duration,
        "quantity": quantity,
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
    }
    return template


def render(report: Report, runs: Sequence[Run], patterns: Sequence[Pattern]) -> str:
    """The page as HTML. Every text that comes from data is escaped by the template engine."""
    template = environment()
    template.filters |= {"setting": comparison.short_value, "count": count_text, "batch": batch_words}
    template.filters["label"] = lambda benchmark: LABELS.get(benchmark, benchmark)
    answers = [row for row in report.comparisons if row.metric == ACCURACY]
    pairs = [row for row in report.comparisons if row.benchmark == SUITE]
    primary = pairs[0]
    points = [row for row in report.comparisons if row.metric in MME_POINTS]
    retrievals = [row for row in report.comparisons if row.metric in RECALLS]
    names = list(report.towers)
    several = len(runs) > len(names)
    return template.get_template("report.html.j2").render(
        report=report,
        runs=runs,
        names=names,
        numbers_of={name: number for number, name in enumerate(names)},
        numbers={name: number % COLOURS for number, name in enumerate(names)},
        primary=primary,
        pairs=pairs,
        recipes=primary.inference == "recipe",
        pretrainings=comparison.pretrained(report.towers),
        pretraining_words=comparison.pretraining_words(report.towers),
        primary_seed=min(run.seed for run in runs),
        headline=report.findings[0],
        basis=report.findings[1],
        answers=comparison.by_benchmark(answers),
        mme=points,
        retrievals=retrievals,
        categories=categories_shown(report.categories),
        few_categories=FEW_CATEGORIES,
        controls=comparison.by_benchmark(report.controls),
        better={(row.benchmark, row.metric, row.a, row.b): row.better for row in report.comparisons},
        limits={
            "answers": limit(answers),
            "mme": 50.0 * ceil(max((abs(bound) for row in points for bound in row.interval), default=1.0) / 50),
            "retrievals": limit(retrievals),
            "controls": limit(report.controls),
            "primary": limit(pairs),
        },
        pooled=(ALL, YES_NO),
        asked=ASKED,
        stages=STAGES,
        other_seconds={
            stage: value
            for stage, value in report.seconds.items()
            if not any(stage in map(comparison.whole_stage, comparison.stage_seconds(run, several)) for run in runs)
        },
        directions=DIRECTIONS,
        recalls=RECALLS,
        charts=training_charts(comparison.first_trainings(runs)),
        patterns=patterns,
        own_figures=own_figures(report),
    )


def limit(rows: Sequence[Comparison]) -> float:
    """End of the symmetric axis on which all intervals of `rows` fit: a multiple of 5 points."""
    return ceil(max((abs(bound) for row in rows for bound in row.interval), default=1.0) * 20 + 1e-9) / 20


def categories_shown(
    rows: Sequence[Category],
) -> list[tuple[str, float, list[tuple[tuple[str, str], list[Category]]]]]:
    """Benchmark, end of its axis, and its categories for each pair of towers, those first on which the first wins most."""
    shown = []
    for benchmark in dict.fromkeys(row.benchmark for row in rows):
        own = [row for row in rows if row.benchmark == benchmark]
        bars = max(max(row.wins, row.losses) / row.n_samples for row in own)
        bounds = max(abs(bound) for row in own for bound in row.interval)
        # Few trainings or questions make intervals so long that they would squash the bars.
        end = max(min(bounds, LONGEST_WHISKER * bars), *(abs(row.difference) for row in own), bars)
        pairs = [
            (pair, sorted((row for row in own if (row.a, row.b) == pair), key=lambda row: -row.difference))
            for pair in dict.fromkeys((row.a, row.b) for row in own)
        ]
        shown.append((benchmark, min(1.0, ceil(end * 20 + 1e-9) / 20), pairs))
    return shown


def own_figures(report: Report) -> list[tuple[str, str, list[float | None]]]:
    """lmms-eval's own aggregated figures: benchmark, metric, value of each tower."""
    benchmarks = [figures["benchmarks"] for figures in report.towers.values()]
    names = {
        (benchmark, metric): None
        for own in benchmarks
        for benchmark, figures in own.items()
        for metric, value in figures["metrics"].items()
        if metric != "n" and isinstance(value, int | float)
    }
    return [(task, metric, [own[task]["metrics"].get(metric) for own in benchmarks]) for task, metric in names]


# ------------------------------------------------------------------------------------------------------ charts


def training_charts(runs: Sequence[Run]) -> list[tuple[str, str, Markup]]:
    """Title, note and SVG of each curve that at least one run recorded."""
    chance = next((100 * run.zero_shot["chance"]["R@1"] for run in runs if run.zero_shot), None)

    def recall(direction: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda row: 100 * row["zero_shot"][direction]["R@1"] if "zero_shot" in row else None

    held_out, sentence = "held-out pictures; dotted: chance", "one of the synthetic sentences"
    panels: list[tuple[str, str, str, Callable[[dict[str, Any]], float | None], float | None]] = [
        (
            "Contrastive, web captions",
            "of one text a picture: the only one",
            "tower",
            lambda row: row.get("contrastive_web", row.get("contrastive")),
            None,
        ),
        ("Contrastive, sub-captions", sentence, "tower", lambda row: row.get("contrastive_sub"), None),
        ("Caption loss", "per token of the synthetic caption", "tower", lambda row: row.get("caption"), None),
        ("R@1 in %, picture → caption", held_out, "tower", recall("image_to_text"), chance),
        ("R@1 in %, caption → picture", held_out, "tower", recall("text_to_image"), chance),
        ("Stage 1 loss", "projector only", "align", lambda row: row.get("loss"), None),
        ("Stage 2 loss", "LLM and projector", "tune", lambda row: row.get("loss"), None),
    ]
    charts = []
    for title, note, field, value, reference in panels:
        x_key = "samples" if field == "tower" else "step"
        lines = []
        for number, run in enumerate(runs):
            measured = [(row[x_key], value(row)) for row in run.logs.get(field, []) if x_key in row]
            points = sorted((x, y) for x, y in measured if y is not None and isfinite(y))
            if points:
                lines.append(Line(run.name, number % COLOURS, points))
        if lines:
            charts.append((title, note, line_chart(title, lines, "seen" if field == "tower" else "steps", reference)))
    return charts


# -------------------------------------------------------------------------------------------------------- words


def count_text(count: float) -> str:
    """A number of questions, or a mean of such numbers: 12, 3.7"""
    return f"{count:.1f}".removesuffix(".0")


def duration(seconds: float | None) -> str:
    """3 h 5 min, 4 min 10 s, 12 s; `unknown` for None."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def quantity(value: float | None, unit: str = "") -> str:
    """1.2 M, 85.3 GFLOP; `unknown` for None."""
    if value is None:
        return "unknown"
    text = short(value)
    prefix = text.lstrip("0123456789.")
    return f"{text.removesuffix(prefix)} {prefix}{unit}".strip()
