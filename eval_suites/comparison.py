"""From runs to figures, tests and sentences.

Towers are compared in pairs on the same questions. The primary comparison, declared here and not chosen by its outcome, is the mean
over the suite's benchmarks of the standardised difference. All others are secondary and get Holm's adjusted p-values before
one is called a difference. Each model is also compared with itself shown a blank picture and other questions' pictures. With
several trainings of each tower, paired by seed, figures and sentences speak of these recipes; with one, of these models.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clips_core.errors import InputError
from clips_core.folders import environment
from eval_suites.fairness import Setting
from eval_suites.records import PICTURES, Key, Record, Run
from eval_suites.statistics import (
    Difference,
    Inference,
    Mean,
    holm,
    mean_score,
    paired_answers,
    paired_difference,
    recall_interval,
    standardised_difference,
)

SUITE = "suite"  # all benchmarks, each counting alike: the primary comparison
ALL, YES_NO = "all questions", "yes/no questions"  # the benchmarks' questions pooled
ACCURACY = "accuracy"  # the mean per-sample score
STANDARDISED = "standardised difference"  # of accuracies, over the standard deviation of a question's score
DIRECTIONS = {"image_to_text": "picture → caption", "text_to_image": "caption → picture"}
RECALLS = ("R@1", "R@5", "R@10")
CONTROLS = ("blank", "shuffled")  # pictures shown instead of the right ones
ALPHA = 0.05
AIM_RECALL = 0.10  # R@1 both ways of a tower trained by the method `clips`


@dataclass(frozen=True)
class Comparison:
    """Mean score of `a` minus that of `b` over the same `n` samples. Of SUITE, in standard deviations of a question's score."""

    benchmark: str
    metric: str
    a: str
    b: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    n: int
    n_seeds: int = 1  # trainings of each
    inference: Inference = "checkpoint"
    detectable: float | None = None  # true difference that this design would have found four times in five


@dataclass(frozen=True)
class Aim:
    """What was set out to reach, whether it was, and the figures."""

    text: str
    met: bool
    figures: str


@dataclass(frozen=True)
class Report:
    """What report.json holds, and the aims."""

    towers: dict[str, dict[str, Any]]
    comparisons: list[Comparison]  # between towers
    controls: list[Comparison]  # of a model with itself, shown other pictures
    seconds: dict[str, float]
    environment: dict[str, Any]
    findings: list[str]  # sentences; the first is the headline
    settings: list[Setting]  # of all trainings: identical, or differing by the towers' nature or otherwise
    aims: list[Aim]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the aims stand among the findings."""
        return {name: value for name, value in asdict(self).items() if name != "aims"}


Scores = NDArray[np.float64]  # [trainings, questions]
Trainings = Sequence[Run]  # of one tower, in the order of their seeds


def by_tower(runs: Sequence[Run]) -> dict[str, Trainings]:
    """The trainings of each tower, in the order of their seeds.

    Raises:
        InputError: unless all towers have trainings of the same seeds, each once: they are compared in pairs.
    """
    towers: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        towers.setdefault(run.name, []).append(run)
    towers = {name: towers[name] for name in dict.fromkeys(run.name for run in runs)}
    seeds = {name: [run.seed for run in own] for name, own in towers.items()}
    first = next(iter(seeds))
    for name, own in seeds.items():
        if len(set(own)) < len(own):
            raise InputError(
                f"{name}: two trainings of the seed {max(own, key=own.count)}; towers need names of their own"
            )
        if own != seeds[first]:
            raise InputError(
                f"trainings are paired by seed, but {first} has the seeds {seeds[first]} and {name} {own}; train what is missing"
            )
    return dict(towers)


def first_trainings(runs: Sequence[Run]) -> list[Run]:
    """Of each tower the training whose answers and curves are shown."""
    return [own[0] for own in by_tower(runs).values()]


def analyse(runs: Sequence[Run], seconds: Mapping[str, float], settings: Sequence[Setting]) -> Report:
    """Figures, tests and sentences of `runs`, which answered the same questions.

    Args:
        seconds: what stages took on the clock, where somebody measured it; the others' are read from the folders.
        settings: in what the trainings are alike and in what not.
    """
    trainings = by_tower(runs)
    groups = question_groups(runs[0].records["real"])
    towers = {name: tower_figures(own, groups) for name, own in trainings.items()}
    pairs = list(itertools.combinations(trainings.values(), 2))
    comparisons = [
        *(
            row
            for a, b in pairs
            for row in (suite(a, b), *(answers(group, keys, a, b) for group, keys in groups.items()))
        ),
        *(row for a, b in pairs for row in retrievals(a[0], b[0])),
    ]
    controls = [
        _answered(
            group,
            name,
            f"{name}, {pictures}",
            _scores(own, "real", keys),
            _scores(own, pictures, keys),
            _clusters(own, keys),
        )
        for name, own in trainings.items()
        for pictures in CONTROLS
        if all(pictures in run.records for run in own)
        for group, keys in groups.items()
    ]
    read = {stage: value for run in runs for stage, value in stage_seconds(run, len(runs) > len(towers)).items()}
    stages = {stage: value for stage, value in read.items() if whole_stage(stage) not in seconds}
    aims = [aim for name, own in trainings.items() for aim in aims_of(own, towers[name], controls)]
    findings = sentences(towers, comparisons, controls) + [
        f"Aim {'met' if aim.met else 'missed'}: {aim.text} ({aim.figures})." for aim in aims
    ]
    findings += [waiver_sentence(setting) for setting in settings if setting.waived]
    return Report(towers, comparisons, controls, {**seconds, **stages}, environment(), findings, list(settings), aims)


# ----------------------------------------------------------------------------------------------------- figures


def whole_stage(stage: str) -> str:
    """`eval clips, blank` is a part of `eval clips`; any other stage is its own whole."""
    return stage.partition(",")[0]


def stage_seconds(run: Run, several: bool = False) -> dict[str, float]:
    """Seconds by stage, tower, seed (of `several`) and, for evaluations, pictures: `pretrain clips`, `eval clips, blank`."""
    seed = f" seed {run.seed}" if several else ""
    names = {
        field: f"{manifest['stage']} {run.name}{'' if field == 'tower' else seed}"
        for field, manifest in run.manifests.items()
    }
    return {f"{names[field]}{f', {field}' if field in PICTURES else ''}": value for field, value in run.seconds.items()}


def question_groups(records: Mapping[Key, Record]) -> dict[str, list[Key]]:
    """What figures are given for: all questions, those with the target yes or no, and each benchmark's."""
    groups = {ALL: list(records)}
    yes_no = [key for key, record in records.items() if record.target.strip().lower() in ("yes", "no")]
    if yes_no:
        groups[YES_NO] = yes_no
    for task in dict.fromkeys(task for task, _ in records):
        groups[task] = [key for key in records if key[0] == task]
    return groups


def tower_figures(own: Trainings, groups: Mapping[str, list[Key]]) -> dict[str, Any]:
    """One tower's part of report.json: paths and figures, means over its trainings."""
    first = own[0]
    trained = first.manifests["tower"]["outputs"] if "tower" in first.manifests else {}
    costs = ("method", "parameters", "flops_per_sample", "seconds", "samples")
    benchmarks: dict[str, Any] = {}
    for group, keys in groups.items():
        real, *controls = (
            _mean(own, pictures, keys) if pictures in first.records else None for pictures in ("real", *CONTROLS)
        )
        assert real is not None
        benchmarks[group] = {**real, **dict(zip(CONTROLS, controls, strict=True)), "metrics": _metrics(own, group)}
    return {
        "tower": {"path": _path(first.entry.tower), **{name: trained.get(name) for name in costs}},
        "mllm": {
            "path": _path(first.entry.tune and first.entry.tune / "model"),
            "align": _path(first.entry.align),
            "tune": _path(first.entry.tune),
            "seeds": [run.seed for run in own],
            "seconds": {stage: first.seconds.get(stage) for stage in ("align", "tune")},
        },
        "zero_shot": zero_shot_figures(first.zero_shot) if first.zero_shot else None,
        "benchmarks": benchmarks,
    }


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _metrics(own: Trainings, task: str) -> dict[str, float]:
    """lmms-eval's own figures of a task, means over the trainings."""
    first = own[0].metrics["real"].get(task, {})
    return {name: float(np.mean([run.metrics["real"][task][name] for run in own])) for name in first}


def zero_shot_figures(zero_shot: Mapping[str, Any]) -> dict[str, Any]:
    """Recalls both ways as measured, with chance and Wilson's intervals."""
    n = zero_shot["n"]
    figures = {"n": n, "chance": zero_shot["chance"]} | {direction: zero_shot[direction] for direction in DIRECTIONS}
    intervals = {
        direction: {recall: recall_interval(round(zero_shot[direction][recall] * n), n) for recall in RECALLS}
        for direction in DIRECTIONS
    }
    return figures | {"intervals": intervals}


def suite(a: Trainings, b: Trainings) -> Comparison:
    """The primary comparison: shown the right pictures, over all benchmarks, each counting alike."""
    own = paired_answers([run.records["real"] for run in a], [run.records["real"] for run in b])
    return _row(SUITE, STANDARDISED, a[0].name, b[0].name, standardised_difference(list(own.values())))


def answers(group: str, keys: list[Key], a: Trainings, b: Trainings) -> Comparison:
    """Two towers' models' answers to the same questions, shown the right pictures."""
    return _answered(
        group, a[0].name, b[0].name, _scores(a, "real", keys), _scores(b, "real", keys), _clusters(a, keys)
    )


def retrievals(a: Run, b: Run) -> list[Comparison]:
    """Two towers' hits on the same queries, where both runs kept the rank of each."""
    if not (a.zero_shot and b.zero_shot and "ranks" in a.zero_shot and "ranks" in b.zero_shot):
        return []
    rows = []
    for direction, recall in itertools.product(DIRECTIONS, RECALLS):
        k = int(recall.removeprefix("R@"))
        hits, other = (
            [float(rank < k) for rank in run.zero_shot["ranks"][direction]] for run in (a, b) if run.zero_shot
        )
        if len(hits) == len(other):
            found = paired_difference(hits, other, range(len(hits)))
            rows.append(_row(f"retrieval, {DIRECTIONS[direction]}", recall, a.name, b.name, found))
    return rows


def _scores(own: Trainings, pictures: str, keys: Sequence[Key]) -> Scores:
    """Scores of `keys`, [trainings, questions]."""
    return np.array([[run.records[pictures][key].score for key in keys] for run in own])


def _clusters(own: Trainings, keys: Sequence[Key]) -> list[tuple[str, str]]:
    """Pictures of different benchmarks are different clusters."""
    return [(key[0], own[0].records["real"][key].cluster) for key in keys]


def _mean(own: Trainings, pictures: str, keys: Sequence[Key]) -> dict[str, Any]:
    mean: Mean = mean_score(_scores(own, pictures, keys), _clusters(own, keys))
    return {
        ACCURACY: mean.value, "interval": mean.interval, "n": mean.n_samples, "n_seeds": mean.n_seeds,
        "n_clusters": mean.n_clusters, "inference": mean.inference,
    }  # fmt: skip


def _answered(
    group: str, a: str, b: str, scores: Scores, other: Scores, clusters: Sequence[tuple[str, str]]
) -> Comparison:
    return _row(group, ACCURACY, a, b, paired_difference(scores, other, clusters))


def _row(benchmark: str, metric: str, a: str, b: str, found: Difference) -> Comparison:
    return Comparison(
        benchmark, metric, a, b, found.difference, found.interval, found.p_value, found.n_samples, found.n_seeds,
        found.inference, found.detectable,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- verdicts


def verdicts(rows: Sequence[Comparison]) -> list[str | None]:
    """Who is better in each row, None where it can't be told.

    It can where the interval leaves out zero and p <= 5 %; p is Holm's over `rows` but for the primary comparison.
    """
    secondary = [i for i, row in enumerate(rows) if row.benchmark != SUITE]
    p_values = [row.p_value for row in rows]
    for i, adjusted in zip(secondary, holm([p_values[i] for i in secondary]), strict=True):
        p_values[i] = adjusted
    return [_better(row, p) for row, p in zip(rows, p_values, strict=True)]


def _better(row: Comparison, p_value: float) -> str | None:
    if p_value > ALPHA or row.interval[0] <= 0 <= row.interval[1]:
        return None
    return row.a if row.difference > 0 else row.b


def by_benchmark(rows: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """Rows in their order, by benchmark."""
    grouped: dict[str, list[Comparison]] = {}
    for row in rows:
        grouped.setdefault(row.benchmark, []).append(row)
    return grouped


def aims_of(own: Trainings, figures: Mapping[str, Any], controls: Sequence[Comparison]) -> list[Aim]:
    """The aims for towers trained by the method `clips`: that it retrieves, and that its LLaVA uses the picture."""
    if figures["tower"]["method"] != "clips":
        return []
    aims = []
    if figures["zero_shot"]:
        recalls = {name: figures["zero_shot"][direction]["R@1"] for direction, name in DIRECTIONS.items()}
        aims.append(
            Aim(
                f"the tower {own[0].name} retrieves with R@1 of at least {percent(AIM_RECALL)} % both ways among "
                f"{figures['zero_shot']['n']} held-out pictures",
                min(recalls.values()) >= AIM_RECALL,
                ", ".join(f"{name} {percent(value)} %" for name, value in recalls.items()),
            )
        )
    for row in controls:
        if (row.benchmark, row.a, row.b) == (YES_NO, own[0].name, f"{own[0].name}, blank"):
            text = f"the LLaVA with {own[0].name} beats itself shown a blank picture on all yes/no questions, interval above 0"
            aims.append(Aim(text, row.interval[0] > 0, f"{points(row.difference)} points {between(row.interval)}"))
    return aims


# --------------------------------------------------------------------------------------------------- sentences


def sentences(
    towers: Mapping[str, Mapping[str, Any]], comparisons: Sequence[Comparison], controls: Sequence[Comparison]
) -> list[str]:
    """What was found, in words; the headline first."""
    primary = [row for row in comparisons if row.benchmark == SUITE]
    marks = zip(comparisons, verdicts(comparisons), strict=True)  # of all rows, but words for accuracy and R@1 only
    secondary = [
        (row, better) for row, better in marks if row.benchmark != SUITE and row.metric in (ACCURACY, RECALLS[0])
    ]
    found = [sentence for row in primary for sentence in (headline(row), basis_sentence(row, towers))]
    for row, better in secondary:
        if better:
            found.append(
                f"On {row.benchmark}, {better} is better by {points(abs(row.difference), signed=False)} points of "
                f"{row.metric} ({row.a} − {row.b}: {points(row.difference)} {between(row.interval)}, p {p_text(row.p_value)})."
            )
    unclear = [f"{row.benchmark} ({row.metric})" for row, better in secondary if not better]
    if unclear:
        found.append(f"No difference can be told on {', '.join(unclear)}.")
    for name, figures in towers.items():
        if figures["zero_shot"]:
            found.append(retrieval_sentence(name, figures["zero_shot"]))
    found += [control_sentence(row) for row in controls if row.benchmark == YES_NO and row.b.endswith(", blank")]
    found += [cost for a, b in itertools.combinations(towers, 2) if (cost := cost_sentence(a, b, towers))]
    found.append(reach_sentence(primary[0]))
    return found


def headline(row: Comparison) -> str:
    """The primary comparison in words."""
    better = _better(row, row.p_value)
    subject = (
        "these two models"
        if row.inference == "checkpoint"
        else f"these two towers, with {row.n_seeds} trainings of each"
    )
    if better is None:
        kind = "models" if row.inference == "checkpoint" else "towers"
        return (
            f"These two {kind} cannot be told apart by their answers: over the suite {row.a} − {row.b} is "
            f"{deviations(row.difference)} of a standard deviation {between(row.interval)}."
        )
    signed = (
        between(row.interval, signed=False) if better == row.a else between((-row.interval[1], -row.interval[0]), False)
    )
    verb = "answers better" if row.inference == "checkpoint" else "makes the better LLaVA"
    return f"Of {subject}, {better} {verb}, by {deviations(abs(row.difference), signed=False)} of a standard deviation {signed}."


def deviations(value: float, signed: bool = True) -> str:
    """A standardised difference in hundredths: 0.152 → +15.2 %"""
    return f"{points(value, signed)} %"


def basis_sentence(row: Comparison, towers: Mapping[str, Mapping[str, Any]]) -> str:
    """What the headline rests on."""
    a, b = (towers[name]["benchmarks"][ALL] for name in (row.a, row.b))
    trainings = "" if row.n_seeds == 1 else f" by {row.n_seeds} trainings of each, paired by seed"
    return (
        f"Asked the same {row.n} questions about {a['n_clusters']} pictures{trainings}, {row.a} answers "
        f"{percent(a[ACCURACY])} % rightly and {row.b} {percent(b[ACCURACY])} %; in the headline every benchmark counts alike, in "
        f"standard deviations of a question's score; p {p_text(row.p_value)}, paired."
    )


def waiver_sentence(setting: Setting) -> str:
    values = ", ".join(f"{name} {value!r}" for name, value in setting.values.items())
    return f"Not only the towers differ: {setting.key} ({values}) was waived."


def reach_sentence(row: Comparison) -> str:
    """What the intervals know of, and what not."""
    if row.inference == "recipe":
        return (
            f"Each tower's LLaVA was trained with {row.n_seeds} seeds, so intervals and tests say what other trainings and other "
            "questions of the same kind could have changed. Each tower itself was pretrained once."
        )
    return (
        "Each tower's LLaVA was trained once, so all this is about these models: intervals and tests say what other questions of "
        "the same kind could have changed, not what another training would have."
    )


def retrieval_sentence(name: str, figures: Mapping[str, Any]) -> str:
    """R@1 both ways beside chance."""
    ways = [
        f"{label} {percent(figures[direction]['R@1'])} % {between(figures['intervals'][direction]['R@1'], signed=False)}"
        for direction, label in DIRECTIONS.items()
    ]
    chance = f"chance {percent(figures['chance']['R@1'])} %"
    return f"Among {figures['n']} held-out pictures, {name} retrieves with R@1 {' and '.join(ways)}; {chance}."


def control_sentence(row: Comparison) -> str:
    """Whether a model's yes/no answers come from the picture."""
    figures = f"{points(row.difference)} points {between(row.interval)}, p {p_text(row.p_value)}, {row.n} questions"
    better = _better(row, row.p_value)
    if better == row.a:
        return f"The LLaVA with {row.a} uses the picture: on yes/no questions it beats itself shown a blank one by {figures}."
    if better == row.b:
        return f"The LLaVA with {row.a} answers yes/no questions worse than when shown a blank picture: {figures}."
    return (
        f"It cannot be told whether the LLaVA with {row.a} uses the picture: yes/no questions, real − blank {figures}."
    )


def cost_sentence(a: str, b: str, towers: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Cost of `a` relative to `b`, where both are known."""
    costs = {"FLOPs a picture": "flops_per_sample", "seconds of pretraining": "seconds", "pictures seen": "samples"}
    ratios = [
        f"{towers[a]['tower'][key] / towers[b]['tower'][key]:.2f} × the {words}"
        for words, key in costs.items()
        if towers[a]["tower"][key] and towers[b]["tower"][key]
    ]
    return f"In pretraining, {a} took {', '.join(ratios)} of {b}." if ratios else None


def percent(value: float) -> str:
    """0.1234 → 12.3"""
    return f"{100 * value:.1f}"


def points(value: float, signed: bool = True) -> str:
    """−0.0123 → −1.2 (percentage points, with a true minus sign)"""
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return text.replace("-", "−")


def between(interval: Sequence[float], signed: bool = True) -> str:
    """(−0.012, 0.034) → [−1.2, +3.4]"""
    return f"[{points(interval[0], signed)}, {points(interval[1], signed)}]"


def p_text(p_value: float) -> str:
    """Ready to follow the letter p: = 0.031, < 0.001"""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def short_value(value: object) -> str:
    """A setting's value in a table's cell; hashes by their beginning."""
    text = "unknown" if value is None else value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text
