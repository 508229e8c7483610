"""From runs to figures, tests and sentences.

Towers are compared in pairs on the same questions; the primary comparison, declared here and not chosen by its outcome, is
that over all questions. The others are secondary and get Holm's adjusted p-values before one is called a difference. Each
model is also compared with itself shown a blank picture and other questions' pictures. One training per tower says
something about these models, so no sentence here speaks of methods.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clips_core.folders import environment
from eval_suites.records import PICTURES, Key, Record, Run
from eval_suites.statistics import Mean, holm, mean_score, paired_difference, recall_interval

ALL, YES_NO = "all questions", "yes/no questions"  # the benchmarks' questions pooled
ACCURACY = "accuracy"  # the mean per-sample score
DIRECTIONS = {"image_to_text": "picture → caption", "text_to_image": "caption → picture"}
RECALLS = ("R@1", "R@5", "R@10")
CONTROLS = ("blank", "shuffled")  # pictures shown instead of the right ones
ALPHA = 0.05
AIM_RECALL = 0.10  # R@1 both ways of a tower trained by the method `clips`


@dataclass(frozen=True)
class Comparison:
    """Mean score of `a` minus that of `b` over the same `n` samples."""

    benchmark: str
    metric: str
    a: str
    b: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    n: int


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
    aims: list[Aim]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the aims stand among the findings."""
        return {name: value for name, value in asdict(self).items() if name != "aims"}


def analyse(runs: Sequence[Run], seconds: Mapping[str, float]) -> Report:
    """Figures, tests and sentences of `runs`, which answered the same questions.

    `seconds`: what stages took on the clock, where somebody measured it; the others' are read from the folders.
    """
    groups = question_groups(runs[0].records["real"])
    towers = {run.name: tower_figures(run, groups) for run in runs}
    comparisons = [
        *(answers(group, keys, a, b) for a, b in itertools.combinations(runs, 2) for group, keys in groups.items()),
        *(row for a, b in itertools.combinations(runs, 2) for row in retrievals(a, b)),
    ]
    controls = [
        _compared(group, ACCURACY, run.name, f"{run.name}, {pictures}", scores, other, clusters)
        for run in runs
        for pictures in CONTROLS
        for group, keys in groups.items()
        for scores, clusters in [_scores(run.records["real"], keys)]
        for other, _ in [_scores(run.records[pictures], keys)]
    ]
    read = {stage: value for run in runs for stage, value in stage_seconds(run).items()}
    stages = {stage: value for stage, value in read.items() if whole_stage(stage) not in seconds}
    aims = [aim for run in runs for aim in aims_of(run, towers[run.name], controls)]
    findings = sentences(towers, comparisons, controls) + [
        f"Aim {'met' if aim.met else 'missed'}: {aim.text} ({aim.figures})." for aim in aims
    ]
    return Report(towers, comparisons, controls, {**seconds, **stages}, environment(), findings, aims)


# ----------------------------------------------------------------------------------------------------- figures


def whole_stage(stage: str) -> str:
    """`eval clips, blank` is a part of `eval clips`; any other stage is its own whole."""
    return stage.partition(",")[0]


def stage_seconds(run: Run) -> dict[str, float]:
    """Seconds by stage, tower and, for evaluations, pictures: `pretrain clips`, `eval clips, blank`."""
    names = {field: f"{manifest['stage']} {run.name}" for field, manifest in run.manifests.items()}
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


def tower_figures(run: Run, groups: Mapping[str, list[Key]]) -> dict[str, Any]:
    """One tower's part of report.json: paths and figures."""
    trained = run.manifests["tower"]["outputs"]
    costs = ("method", "parameters", "flops_per_sample", "seconds", "samples")
    benchmarks: dict[str, Any] = {}
    for group, keys in groups.items():
        real, blank, shuffled = (_mean(run.records[pictures], keys) for pictures in ("real", *CONTROLS))
        benchmarks[group] = {
            **real,
            "blank": blank,
            "shuffled": shuffled,
            "metrics": run.metrics["real"].get(group, {}),
        }
    return {
        "tower": {"path": str(run.entry.tower), **{name: trained.get(name) for name in costs}},
        "mllm": {
            "path": str(run.entry.tune / "model"),
            "align": str(run.entry.align),
            "tune": str(run.entry.tune),
            "seconds": {stage: run.seconds.get(stage) for stage in ("align", "tune")},
        },
        "zero_shot": zero_shot_figures(run.zero_shot) if run.zero_shot else None,
        "benchmarks": benchmarks,
    }


def zero_shot_figures(zero_shot: Mapping[str, Any]) -> dict[str, Any]:
    """Recalls both ways as measured, with chance and Wilson's intervals."""
    n = zero_shot["n"]
    figures = {"n": n, "chance": zero_shot["chance"]} | {direction: zero_shot[direction] for direction in DIRECTIONS}
    intervals = {
        direction: {recall: recall_interval(round(zero_shot[direction][recall] * n), n) for recall in RECALLS}
        for direction in DIRECTIONS
    }
    return figures | {"intervals": intervals}


def answers(group: str, keys: list[Key], a: Run, b: Run) -> Comparison:
    """Two models' answers to the same questions, shown the right pictures."""
    (scores, clusters), (other, _) = _scores(a.records["real"], keys), _scores(b.records["real"], keys)
    return _compared(group, ACCURACY, a.name, b.name, scores, other, clusters)


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
            rows.append(
                _compared(f"retrieval, {DIRECTIONS[direction]}", recall, a.name, b.name, hits, other, range(len(hits)))
            )
    return rows


def _scores(records: Mapping[Key, Record], keys: Sequence[Key]) -> tuple[list[float], list[tuple[str, str]]]:
    """Scores and clusters of `keys`. Pictures of different benchmarks are different clusters."""
    return [records[key].score for key in keys], [(key[0], records[key].cluster) for key in keys]


def _mean(records: Mapping[Key, Record], keys: Sequence[Key]) -> dict[str, Any]:
    mean: Mean = mean_score(*_scores(records, keys))
    return {ACCURACY: mean.value, "interval": mean.interval, "n": mean.n, "n_clusters": mean.n_clusters}


def _compared(
    benchmark: str, metric: str, a: str, b: str, scores: list[float], other: list[float], clusters: Sequence[Any]
) -> Comparison:
    found = paired_difference(scores, other, clusters)
    return Comparison(benchmark, metric, a, b, found.difference, found.interval, found.p_value, found.n)


# ---------------------------------------------------------------------------------------------------- verdicts


def verdicts(rows: Sequence[Comparison]) -> list[str | None]:
    """Who is better in each row, None where it can't be told.

    It can where the interval leaves out zero and p <= 5 %; p is Holm's over `rows` but for the primary comparison.
    """
    secondary = [i for i, row in enumerate(rows) if row.benchmark != ALL]
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


def aims_of(run: Run, figures: Mapping[str, Any], controls: Sequence[Comparison]) -> list[Aim]:
    """The aims for towers trained by the method `clips`: that it retrieves, and that its LLaVA uses the picture."""
    if figures["tower"]["method"] != "clips":
        return []
    aims = []
    if figures["zero_shot"]:
        recalls = {name: figures["zero_shot"][direction]["R@1"] for direction, name in DIRECTIONS.items()}
        aims.append(
            Aim(
                f"the tower {run.name} retrieves with R@1 of at least {percent(AIM_RECALL)} % both ways among "
                f"{figures['zero_shot']['n']} held-out pictures",
                min(recalls.values()) >= AIM_RECALL,
                ", ".join(f"{name} {percent(value)} %" for name, value in recalls.items()),
            )
        )
    for row in controls:
        if (row.benchmark, row.a, row.b) == (YES_NO, run.name, f"{run.name}, blank"):
            text = f"the LLaVA with {run.name} beats itself shown a blank picture on all yes/no questions, interval above 0"
            aims.append(Aim(text, row.interval[0] > 0, f"{points(row.difference)} points {between(row.interval)}"))
    return aims


# --------------------------------------------------------------------------------------------------- sentences


def sentences(
    towers: Mapping[str, Mapping[str, Any]], comparisons: Sequence[Comparison], controls: Sequence[Comparison]
) -> list[str]:
    """What was found, in words; the headline first."""
    primary = [row for row in comparisons if row.benchmark == ALL]
    marks = zip(comparisons, verdicts(comparisons), strict=True)  # of all rows, but words for accuracy and R@1 only
    secondary = [
        (row, better) for row, better in marks if row.benchmark != ALL and row.metric in (ACCURACY, RECALLS[0])
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
    found.append(
        "Each tower was trained once, so all this is about these models: intervals and tests say what other questions of "
        "the same kind could have changed, not what another training would have."
    )
    return found


def headline(row: Comparison) -> str:
    """The primary comparison in words."""
    better = _better(row, row.p_value)
    if better is None:
        return (
            f"These two models cannot be told apart by their answers: {row.a} − {row.b} is {points(row.difference)} points of "
            f"accuracy {between(row.interval)}."
        )
    signed = (
        between(row.interval, signed=False) if better == row.a else between((-row.interval[1], -row.interval[0]), False)
    )
    return (
        f"Of these two models, {better} answers better, by {points(abs(row.difference), signed=False)} points of accuracy "
        f"{signed}."
    )


def basis_sentence(row: Comparison, towers: Mapping[str, Mapping[str, Any]]) -> str:
    """What the headline rests on."""
    a, b = (towers[name]["benchmarks"][ALL] for name in (row.a, row.b))
    return (
        f"Shown the same {row.n} questions about {a['n_clusters']} pictures, {row.a} answers {percent(a[ACCURACY])} % rightly and "
        f"{row.b} {percent(b[ACCURACY])} %; p {p_text(row.p_value)}, paired."
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
