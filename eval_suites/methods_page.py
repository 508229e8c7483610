"""A study of methods as a figure to print: each arm under each budget, and the difference to the baseline on each data."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

OWN = "own"  # data of the study's main part
MARKS = {"pictures": "o", "flops": "s"}
BUDGETS = {"pictures": "pictures", "flops": "FLOPs"}


def figure(study: Mapping[str, Any], kind: str) -> bytes:
    """R@1 of the arms, a dot a budget; and with several data, differences to the baseline over them. Same study, same bytes.

    Args:
        study: as `eval_suites.study_methods.analyse` gives it.
        kind: svg or png.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows: list[Mapping[str, Any]] = study["rows"]
    arms = [row for row in rows if row["data"] == OWN] or rows
    swept = [row for row in rows if row["budget"] == "pictures" and row["difference"] is not None]
    others = dict.fromkeys(row["data"] for row in swept if row["data"] != OWN)
    with matplotlib.rc_context({"svg.hashsalt": "methods", "font.size": 9, "svg.fonttype": "none"}):
        drawing = Figure(figsize=(8.4 if others else 4.8, 3.4), layout="constrained")
        panels = drawing.subplots(1, 2 if others else 1, squeeze=False)[0]
        _arms(panels[0], arms, study["baseline"])
        if others:
            wanted = {row["arm"] for row in swept if row["data"] != OWN}
            _differences(panels[1], [row for row in swept if row["arm"] in wanted], study["baseline"])
        trainings = sorted({len(row["seeds"]) for row in rows})
        several = f"{trainings[0]} to {trainings[-1]}" if len(trainings) > 1 else f"{trainings[0]}"
        drawing.supxlabel(f"95 % intervals; {several} trainings a dot", fontsize=8, color="0.35")
        buffer = io.BytesIO()
        drawing.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _arms(panel: Any, rows: Sequence[Mapping[str, Any]], baseline: str) -> None:
    names = list(dict.fromkeys(row["arm"] for row in rows))
    budgets = [budget for budget in MARKS if any(row["budget"] == budget for row in rows)]
    for number, budget in enumerate(budgets):
        own = [row for row in rows if row["budget"] == budget]
        ys = [names.index(row["arm"]) + 0.16 * (number - (len(budgets) - 1) / 2) for row in own]
        _whiskers(panel, [row["recall"] for row in own], ys, budget, number, f"equal {BUDGETS[budget]}")
    panel.set_yticks(range(len(names)), labels=[f"{name} (baseline)" if name == baseline else name for name in names])
    panel.invert_yaxis()
    panel.set(xlabel="R@1 in %, mean of both ways")
    panel.set_title("Arms", loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", color="0.9")
    _legend(panel)


def _differences(panel: Any, rows: Sequence[Mapping[str, Any]], baseline: str) -> None:
    data = sorted(dict.fromkeys(row["data"] for row in rows), key=lambda name: (name == OWN, name))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for number, arm in enumerate(arms):
        own = [row for row in rows if row["arm"] == arm]
        ys = [data.index(row["data"]) + 0.16 * (number - (len(arms) - 1) / 2) for row in own]
        found = [{"value": row["difference"]["difference"], "interval": row["difference"]["interval"]} for row in own]
        _whiskers(panel, found, ys, "pictures", number, arm)
    panel.axvline(0, color="0.4", linewidth=1, linestyle=(0, (1, 2)))
    panel.set_yticks(range(len(data)), labels=[name.replace("_", " ") for name in data])
    panel.invert_yaxis()
    panel.set(xlabel=f"R@1 minus that of {baseline}, in points")
    panel.set_title("On other data, equal pictures", loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", color="0.9")
    _legend(panel)


def _legend(panel: Any) -> None:
    """Above the panel, beside its title: inside it would cover a whisker sooner or later."""
    panel.legend(
        frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, borderpad=0, columnspacing=1
    )


def _whiskers(
    panel: Any, found: Sequence[Mapping[str, Any]], ys: Sequence[float], budget: str, number: int, label: str
) -> None:
    values = [100 * float(own["value"]) for own in found]
    lows = [max(0.0, value - 100 * own["interval"][0]) for value, own in zip(values, found, strict=True)]
    highs = [max(0.0, 100 * own["interval"][1] - value) for value, own in zip(values, found, strict=True)]
    panel.errorbar(
        values, ys, xerr=[lows, highs], fmt=MARKS[budget], color=f"C{number}", label=label, markersize=5,
        elinewidth=1, capsize=2,
    )  # fmt: skip
