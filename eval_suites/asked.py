"""How a tower's models were asked and, where a judge scored their answers, by whom: read from what the evaluations recorded."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from eval_suites.benchmarks import UNKNOWN
from eval_suites.judge import told
from eval_suites.records import Run

SETTINGS = ("device", "dtype", "attention", "batch_size", "lmms_eval")


def evaluation_of(own: Sequence[Run]) -> dict[str, Any]:
    """How the questions were put to a tower's trainings: one value where all were asked alike, else a list by seed.

    `batch_check` adds up all trainings: how many answers were given once more in a batch of one, and how many of them changed.
    `partial` are the benchmarks whose files do not hold the published number of questions: [have, published].
    `reported` has the figures that came with an import of lmms-eval's output and are others when scored here.
    """
    manifests = [run.manifests["real"] for run in own]
    columns = {
        "answered_by": [_answered_by(manifest) for manifest in manifests],
        "model": [manifest["outputs"].get("model", UNKNOWN) for manifest in manifests],
        **{name: [manifest["config"].get(name, UNKNOWN) for manifest in manifests] for name in SETTINGS},
        "other_prompts": [sorted(manifest["config"].get("prompts", {})) for manifest in manifests],
    }
    return {
        **{name: values[0] if all(value == values[0] for value in values) else values for name, values in columns.items()},
        "empty_answers": _empty_answers(own),
        "partial": manifests[0]["outputs"].get("partial", {}),
        "batch_check": _batch_check(manifests),
        "reported": [row for run in own for row in _reported(run)],
    }  # fmt: skip


def _answered_by(manifest: Mapping[str, Any]) -> str:
    imported = manifest["outputs"].get("imported")
    if imported is not None:
        return f"lmms-eval itself, imported (run of {imported.get('date') or 'unknown date'})"
    name = str(manifest["outputs"].get("model", ""))
    return f"lmms-eval's own class {name.removeprefix('lmms:')}" if name.startswith("lmms:") else "clips-llava"


def _empty_answers(own: Sequence[Run]) -> dict[str, int]:
    """By benchmark, how many answers hold nothing: an import may allow them. Of all trainings together."""
    found: dict[str, int] = {}
    for run in own:
        for (task, _), record in run.records["real"].items():
            if not record.answer.strip():
                found[task] = found.get(task, 0) + 1
    return found


def _batch_check(manifests: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for manifest in manifests:
        for task, own in manifest["outputs"].get("batch_check", {}).items():
            total = found.setdefault(task, {"n": 0, "changed": 0})
            for count in ("n", "changed"):
                total[count] += own[count]
    return {task: {**own, "share": own["changed"] / own["n"]} for task, own in found.items()}


def _reported(run: Run) -> list[dict[str, Any]]:
    rows = []
    for task, figures in run.manifests["real"]["outputs"].get("reported", {}).items():
        for metric, value in figures.items():
            scored = run.metrics["real"].get(task, {}).get(metric)
            if scored is not None and abs(value - scored) > 1e-6 * max(1.0, abs(value)):
                rows.append({"seed": run.seed, "task": task, "metric": metric, "reported": value, "scored": scored})
    return rows


def batch_words(evaluation: Mapping[str, Any], task: str = "") -> str:
    """Of one benchmark, what answering in batches changed: `1 of 32 (3.1 %)`; or, as of none, why nothing was measured."""
    found = evaluation["batch_check"].get(task)
    if found is not None:
        return f"{found['changed']:g} of {found['n']:g} ({100 * found['share']:.1f} %)"
    if evaluation["batch_size"] == 1:
        return "none: asked one by one"
    return "none: float32" if evaluation["dtype"] == "float32" else "not measured"


def batch_sentence(name: str, evaluation: Mapping[str, Any]) -> str | None:
    """What answering in batches changed in all; None where it was not measured."""
    n, changed = (sum(own[count] for own in evaluation["batch_check"].values()) for count in ("n", "changed"))
    if not n:
        return None
    return (
        f"Asked one by one instead of in batches of {evaluation['batch_size']}, {name} gives another answer to {changed:g} of "
        f"{n:g} questions ({100 * changed / n:.1f} %)."
    )


# ------------------------------------------------------------------------------------------------------------- judges


def judges_of(own: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """By judged benchmark: who judged a tower's trainings, when, how often, and how sure of itself the judge was.

    All of them were judged by the same (`judge.check_judged`). `judge_error` is the standard error of the mean over trainings that
    the judge's scatter alone makes; None: judged once.
    """
    found = {}
    for task, who in own[0].manifests["real"]["outputs"].get("judge", {}).items():
        each = [run.manifests["real"]["outputs"]["judge"][task] for run in own]
        errors = [judged["judge_error"] for judged in each]
        known = [error for error in errors if error is not None]
        dates = [judged["date"] for judged in each]
        found[task] = {
            **{key: who[key] for key in ("model", "answered_by", "endpoint", "temperature", "prompt_sha256", "prompt")},
            "told": told(who),
            "date": [min(dates), max(dates)],
            "repeats": [judged["repeats"] for judged in each],
            "judge_error": sqrt(sum(error**2 for error in known)) / len(own) if len(known) == len(own) else None,
            "capabilities": _capabilities(each),
        }
    return found


def _capabilities(each: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Score of 0-1 by capability, means over trainings, which answered the same questions."""
    return {
        name: {"score": sum(judged["categories"][name]["score"] for judged in each) / len(each), "n": own["n"]}
        for name, own in each[0]["categories"].items()
    }


def judge_sentence(task: str, judge: Mapping[str, Any]) -> str:
    """Who judged a benchmark."""
    day, last = (date[:10] for date in judge["date"])
    when = day if day == last else f"{day} to {last}"
    often = sorted(set(judge["repeats"]))
    times = "once" if often == [1] else f"{' or '.join(map(str, often))} times"
    return (
        f"{task} was judged by {judge['told']}, every answer {times}, on {when}: its scores compare with each other, and "
        "with no other judge's."
    )
