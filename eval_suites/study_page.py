"""A caption study as one page, captions.html, and as a figure to print, captions.svg and captions.png."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from markupsafe import Markup

from eval_suites import study_curves
from eval_suites.charts import IntervalLine, interval_chart
from eval_suites.page import environment
from eval_suites.study_curves import LABELS, MEASURES, Curve, Study

SOURCES = {"synthetic": "Synthetic captions", "web": "Web captions"}
NUMBERS = {strategy: number for number, strategy in enumerate(LABELS)}  # colour and dash of a strategy
X_NAME = "tokens of the text in training (log scale)"


def render(study: Study) -> str:
    """The page as HTML, without script or outside resource. Every text that comes from data is escaped by the engine."""
    return (
        environment()
        .get_template("study.html.j2")
        .render(
            study=study,
            name=Path(study.config["out"]).name,
            headline=study.findings[0],
            basis=study.findings[1],
            labels=LABELS,
            numbers=NUMBERS,
            measures=MEASURES,
            present=study_curves.strategies(study.curves),
            charts={measure: _panels(study, measure) for measure in MEASURES},
            trends=[curve for curve in study.curves if curve.trend is not None],
            several=any(point.trainings > 1 for curve in study.curves for point in curve.points),
        )
    )


def _panels(study: Study, measure: str) -> list[tuple[str, Markup]]:
    """Title and chart of each source, in %."""
    panels = []
    for source, title in SOURCES.items():
        lines = [
            IntervalLine(LABELS[curve.strategy], NUMBERS[curve.strategy], _in_percent(curve))
            for curve in _curves(study, source, measure)
        ]
        if lines:
            panels.append((title, interval_chart(f"{title}, {MEASURES[measure]}", lines, X_NAME, 100 * study.chance)))
    return panels


def _curves(study: Study, source: str, measure: str) -> list[Curve]:
    return [curve for curve in study.curves if (curve.source, curve.measure) == (source, measure)]


def _in_percent(curve: Curve) -> list[tuple[float, float, float, float]]:
    return [(point.length, 100 * point.value, *(100 * bound for bound in point.interval)) for point in curve.points]  # type: ignore[misc]


def figure(study: Study, kind: Literal["svg", "png"] | str) -> bytes:
    """R@1, mean of both ways, against length: a panel a source, each with its own y axis. The same study, the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    sources = [source for source in SOURCES if _curves(study, source, "mean")]
    with matplotlib.rc_context({"svg.hashsalt": "captions", "font.size": 9, "svg.fonttype": "none"}):
        drawing = Figure(figsize=(4.0 * len(sources) + 0.4, 3.4), layout="constrained")
        for panel, source in zip(drawing.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
            curves = _curves(study, source, "mean")
            for place, curve in enumerate(curves):
                xs, ys, lows, highs = zip(*_in_percent(curve), strict=True)
                shifted = [x * 1.03 ** (place - (len(curves) - 1) / 2) for x in xs]  # whiskers beside one another
                errors = [_differences(ys, lows), _differences(highs, ys)]
                number = NUMBERS[curve.strategy]
                style = {"color": f"C{number}", "linestyle": ("-", "--", ":", "-.")[number], "marker": "o"}
                panel.errorbar(
                    shifted, ys, errors, label=LABELS[curve.strategy], markersize=4, elinewidth=1, capsize=2, **style
                )
            panel.axhline(100 * study.chance, color="0.4", linewidth=1, linestyle=(0, (1, 2)), label="chance")
            panel.set_xscale("log", base=2)
            lengths = sorted({point.length for curve in curves for point in curve.points})
            panel.set_xticks(lengths, labels=[str(length) for length in lengths])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_ylim(bottom=0)
            panel.set(
                title=SOURCES[source], xlabel="tokens of the text in training", ylabel="R@1 in %, mean of both ways"
            )
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False, fontsize=8)
        trained = "one training per point" if all(p.trainings == 1 for c in study.curves for p in c.points) else ""
        finished = "" if len(study.points) == study.of else f"{len(study.points)} of {study.of} points"
        drawing.supxlabel("; ".join(filter(None, ["95 % intervals", trained, finished])), fontsize=8, color="0.35")
        buffer = io.BytesIO()
        drawing.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [max(0.0, x - y) for x, y in zip(a, b, strict=True)]
