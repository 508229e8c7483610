"""From runs to figures, tests and sentences.

Towers are compared in pairs on the same questions. The primary comparison, declared here and not chosen by its outcome, is the mean
over the suite's benchmarks of the standardised difference; of three towers and more there are several pairs, whose p-values get
Holm's adjustment. All others are secondary and get it among themselves before one is called a difference: a benchmark's accuracy,
MME's points, recall. Categories within benchmarks are a look around, in
`eval_suites.categories`. Each model is also compared with itself shown a blank picture and other questions' pictures. With
several trainings of each tower, paired by seed, figures and sentences speak of these recipes; with one, of these checkpoints.
"""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clips_core.errors import InputError
from clips_core.folders import environment
from eval_suites.anchor import Anchor
from eval_suites.asked import batch_sentence, evaluation_of, judge_sentence, judges_of
from eval_suites.categories import Category, by_category, categories_of
from eval_suites.fairness import Setting
from eval_suites.published import Beside
from eval_suites.records import PICTURES, Key, Record, Run
from eval_suites.statistics import (
    MME_COGNITION,
    MME_PERCEPTION,
    Difference,
    Inference,
    Mean,
    better_of,
    holm,
    mean_score,
    mme_difference,
    mme_score,
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
# MME's two sums, in points; what lmms-eval calls them, and the categories that they are over.
MME_POINTS = {
    "MME perception": ("mme_perception_score", MME_PERCEPTION),
    "MME cognition": ("mme_cognition_score", MME_COGNITION),
}
CONTROLS = ("blank", "shuffled")  # pictures shown instead of the right ones
AIM_RECALL = 0.10  # R@1 both ways of a tower trained by the method `clips`


@dataclass(frozen=True)
class Comparison:
    """Mean score of `a` minus that of `b` over the same samples. Of SUITE, in standard deviations of a question's score.

    Of the metrics MME_POINTS it is in MME's points.
    """

    benchmark: str
    metric: str
    a: str
    b: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    adjusted_p: float  # Holm's, over the family that `with_verdicts` says
    better: str | None  # None: cannot be told
    n_samples: int
    n_clusters: int  # pictures; of MME pairs of questions
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
    categories: list[Category]  # between towers, within benchmarks
    seconds: dict[str, float]
    environment: dict[str, Any]
    findings: list[str]  # sentences; the first is the headline
    settings: list[Setting]  # of all trainings: identical, or differing by the towers' nature or otherwise
    aims: list[Aim]
    published: Beside = field(default_factory=Beside)
    anchor: Anchor | None = None
    anchored: list[str] = field(default_factory=list)  # sentences on the anchor

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


def of_each_pretraining(own: Trainings) -> Trainings:
    """One training for each pretraining of a tower: all where the tower was pretrained anew for each seed, else the first."""
    folders = {run.entry.tower and run.entry.tower.resolve() for run in own}
    return own if None not in folders and len(folders) == len(own) else own[:1]


def first_trainings(runs: Sequence[Run]) -> list[Run]:
    """Of each tower the training whose answers and curves are shown."""
    return [own[0] for own in by_tower(runs).values()]


def analyse(
    runs: Sequence[Run], seconds: Mapping[str, float], settings: Sequence[Setting], with_aims: bool = False
) -> Report:
    """Figures, tests and sentences of `runs`, which answered the same questions.

    Args:
        seconds: what stages took on the clock, where somebody measured it; the others' are read from the folders.
        settings: in what the trainings are alike and in what not.
        with_aims: say whether the demo's aims were met.
    """
    trainings = by_tower(runs)
    groups = question_groups(runs[0].records["real"])
    towers = {name: tower_figures(own, groups) for name, own in trainings.items()}
    pairs = list(itertools.combinations(trainings.values(), 2))
    comparisons = with_verdicts([
        *(
            row
            for a, b in pairs
            for row in (
                suite(a, b),
                *(answers(group, keys, a, b) for group, keys in groups.items()),
                *mme_points(a, b),
            )
        ),
        *(row for a, b in pairs for row in retrievals(of_each_pretraining(a), of_each_pretraining(b))),
    ])  # fmt: skip
    controls = with_verdicts([
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
    ])  # fmt: skip
    parts = categories_of(runs[0].records["real"], runs[0].suite)
    categories = [row for a, b in pairs for row in by_category(a, b, parts)]
    read = {stage: value for run in runs for stage, value in stage_seconds(run, len(runs) > len(towers)).items()}
    stages = {stage: value for stage, value in read.items() if whole_stage(stage) not in seconds}
    judged = trainings.items() if with_aims else ()
    aims = [aim for name, own in judged for aim in aims_of(own, towers[name], controls)]
    findings = sentences(towers, comparisons, controls) + [
        f"Aim {'met' if aim.met else 'missed'}: {aim.text} ({aim.figures})." for aim in aims
    ]
    findings += [waiver_sentence(setting) for setting in settings if setting.waived]
    return Report(
        towers, comparisons, controls, categories, {**seconds, **stages}, environment(), findings, list(settings), aims
    )


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
    first, towers = own[0], of_each_pretraining(own)
    trained = first.manifests["tower"]["outputs"] if "tower" in first.manifests else {}
    costs = ("method", "parameters", "flops_per_sample", "seconds", "samples")
    measured = [run.zero_shot for run in towers if run.zero_shot]
    benchmarks: dict[str, Any] = {}
    for group, keys in groups.items():
        real, *controls = (
            _mean(own, pictures, keys) if pictures in first.records else None for pictures in ("real", *CONTROLS)
        )
        assert real is not None
        benchmarks[group] = {**real, **dict(zip(CONTROLS, controls, strict=True)), "metrics": _metrics(own, group)}
        benchmarks[group]["points"] = {
            metric: _points(own, keys) for metric, keys in mme_questions(own[0], group).items()
        }
    return {
        "tower": {
            "path": _path(first.entry.tower),
            "pretrainings": len(towers),
            **{name: trained.get(name) for name in costs},
        },
        "mllm": {
            "path": _path(
                first.entry.tune and next(iter(first.entry.tune.glob("adapter")), first.entry.tune / "model")
            ),
            "align": _path(first.entry.align),
            "tune": _path(first.entry.tune),
            "seeds": [run.seed for run in own],
            "seconds": {stage: first.seconds.get(stage) for stage in ("align", "tune")},
        },
        "zero_shot": zero_shot_figures(measured) if len(measured) == len(towers) else None,
        "benchmarks": benchmarks,
        "evaluation": evaluation_of(own),
        "judges": judges_of(own),
    }


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _metrics(own: Trainings, task: str) -> dict[str, float]:
    """lmms-eval's own figures of a task, means over the trainings."""
    first = own[0].metrics["real"].get(task, {})
    return {name: float(np.mean([run.metrics["real"][task][name] for run in own])) for name in first}


def zero_shot_figures(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Recalls both ways, means over a tower's pretrainings, with chance and intervals."""
    first = measured[0]
    means = {
        direction: {recall: float(np.mean([own[direction][recall] for own in measured])) for recall in RECALLS}
        for direction in DIRECTIONS
    }
    intervals = {
        direction: {recall: _recall_interval(measured, direction, recall) for recall in RECALLS}
        for direction in DIRECTIONS
    }
    return {"n": first["n"], "chance": first["chance"], **means, "intervals": intervals}


def _recall_interval(measured: Sequence[Mapping[str, Any]], direction: str, recall: str) -> tuple[float, float]:
    """A picture's captions are queries that belong together. If nobody kept whose they are, pictures alone are counted: too
    wide an interval rather than too short a one."""
    first = measured[0]
    pictures = query_pictures(first, direction)
    if pictures and all("ranks" in own for own in measured):
        return mean_score(_hits(measured, direction, recall), pictures).interval
    return recall_interval(round(first[direction][recall] * first["n"]), first["n"])


def _hits(measured: Sequence[Mapping[str, Any]], direction: str, recall: str) -> Scores:
    """Whether each query found what it should, [pretrainings, queries]."""
    return (np.array([own["ranks"][direction] for own in measured]) < depth(recall)).astype(np.float64)


def query_pictures(zero_shot: Mapping[str, Any], direction: str) -> list[int] | None:
    """The picture that each query is, or belongs to; None: pictures have several captions, and it is not known which."""
    n = zero_shot["n"]
    if direction == "image_to_text" or zero_shot.get("captions", n) == n:
        return list(range(n))
    return zero_shot.get("owner")


def depth(recall: str) -> int:
    """R@5 → 5"""
    return int(recall.removeprefix("R@"))


def suite(a: Trainings, b: Trainings) -> Comparison:
    """The primary comparison: shown the right pictures, over all benchmarks, each counting alike."""
    own = paired_answers([run.records["real"] for run in a], [run.records["real"] for run in b])
    return _row(SUITE, STANDARDISED, a[0].name, b[0].name, standardised_difference(list(own.values())))


def answers(group: str, keys: list[Key], a: Trainings, b: Trainings) -> Comparison:
    """Two towers' models' answers to the same questions, shown the right pictures."""
    return _answered(
        group, a[0].name, b[0].name, _scores(a, "real", keys), _scores(b, "real", keys), _clusters(a, keys)
    )


def mme_questions(run: Run, task: str) -> dict[str, list[Key]]:
    """The questions of MME's perception and of its cognition, those that the task has; empty for any other task.

    Half a pair has no points: of a run that was cut off inside one (an import may be) there is nothing.
    """
    asks = run.suite.tasks[task].metrics if task in run.suite.tasks else []
    records = run.records["real"]
    found = {}
    for metric, (name, categories) in MME_POINTS.items():
        keys = [key for key, record in records.items() if key[0] == task and record.category in categories]
        if name in asks and keys and set(Counter(records[key].cluster for key in keys).values()) == {2}:
            found[metric] = keys
    return found


def mme_points(a: Trainings, b: Trainings) -> list[Comparison]:
    """Two towers' models by MME's own sums, shown the right pictures."""
    rows = []
    for task in a[0].suite.tasks:
        for metric, keys in mme_questions(a[0], task).items():
            found = mme_difference(
                _scores(a, "real", keys), _scores(b, "real", keys), _clusters(a, keys), _categories(a, keys)
            )
            rows.append(_row(task, metric, a[0].name, b[0].name, found))
    return rows


def retrievals(a: Trainings, b: Trainings) -> list[Comparison]:
    """Two towers' hits on the same queries, where all runs kept the rank of each and the pictures of these are known.

    Args:
        a, b: a run for each pretraining.
    """
    measured = [[run.zero_shot for run in own if run.zero_shot and "ranks" in run.zero_shot] for own in (a, b)]
    if len(a) != len(b) or any(len(own) < len(a) for own in measured):
        return []
    rows = []
    for direction, recall in itertools.product(DIRECTIONS, RECALLS):
        hits, other = (_hits(own, direction, recall) for own in measured)
        pictures, others = (query_pictures(own[0], direction) for own in measured)
        if pictures and pictures == others and hits.shape == other.shape:
            found = paired_difference(hits, other, pictures)
            rows.append(_row(f"retrieval, {DIRECTIONS[direction]}", recall, a[0].name, b[0].name, found))
    return rows


def _scores(own: Trainings, pictures: str, keys: Sequence[Key]) -> Scores:
    """Scores of `keys`, [trainings, questions]."""
    return np.array([[run.records[pictures][key].score for key in keys] for run in own])


def _clusters(own: Trainings, keys: Sequence[Key]) -> list[str]:
    """A picture that two benchmarks share is one cluster."""
    return [own[0].records["real"][key].cluster for key in keys]


def _categories(own: Trainings, keys: Sequence[Key]) -> list[str]:
    return [own[0].records["real"][key].category for key in keys]


def _mean(own: Trainings, pictures: str, keys: Sequence[Key]) -> dict[str, Any]:
    return _plain(ACCURACY, mean_score(_scores(own, pictures, keys), _clusters(own, keys)))


def _points(own: Trainings, keys: Sequence[Key]) -> dict[str, Any]:
    """MME's points with their interval, and `most`: 200 for each category."""
    categories = _categories(own, keys)
    mean = mme_score(_scores(own, "real", keys), _clusters(own, keys), categories)
    return {**_plain("value", mean), "most": 200 * len(set(categories))}


def _plain(name: str, mean: Mean) -> dict[str, Any]:
    return {
        name: mean.value, "interval": mean.interval, "n_samples": mean.n_samples, "n_seeds": mean.n_seeds,
        "n_clusters": mean.n_clusters, "inference": mean.inference,
    }  # fmt: skip


def _answered(group: str, a: str, b: str, scores: Scores, other: Scores, clusters: Sequence[str]) -> Comparison:
    return _row(group, ACCURACY, a, b, paired_difference(scores, other, clusters))


def _row(benchmark: str, metric: str, a: str, b: str, found: Difference) -> Comparison:
    return Comparison(
        benchmark, metric, a, b, found.difference, found.interval, found.p_value, found.p_value, None, found.n_samples,
        found.n_clusters, found.n_seeds, found.inference, found.detectable,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- verdicts


def with_verdicts(rows: Sequence[Comparison]) -> list[Comparison]:
    """Rows with Holm's adjusted p and, where it can be told, who is better: p <= 5 % and an interval that leaves out zero.

    The primary comparisons, one a pair of towers, are a family; all other rows are another.
    """
    found = list(rows)
    for primary in (True, False):
        family = [i for i, row in enumerate(rows) if (row.benchmark == SUITE) == primary]
        for i, adjusted in zip(family, holm([rows[i].p_value for i in family]), strict=True):
            row = rows[i]
            better = better_of(row.a, row.b, row.difference, adjusted, row.interval)
            found[i] = replace(row, adjusted_p=adjusted, better=better)
    return found


def by_benchmark(rows: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """Rows in their order, by benchmark."""
    grouped: dict[str, list[Comparison]] = {}
    for row in rows:
        grouped.setdefault(row.benchmark, []).append(row)
    return grouped


def aims_of(own: Trainings, figures: Mapping[str, Any], controls: Sequence[Comparison]) -> list[Aim]:
    """The demo's aims for towers trained by the method `clips`: that it retrieves, and that its LLaVA uses the picture."""
    if figures["tower"]["method"] != "clips":
        return []
    aims = []
    if figures["zero_shot"]:
        recalls = {name: figures["zero_shot"][direction]["R@1"] for direction, name in DIRECTIONS.items()}
        tower = checkpoint_of(f"the tower {own[0].name}", figures["tower"]["pretrainings"])
        aims.append(
            Aim(
                f"{tower} retrieves with R@1 of at least {percent(AIM_RECALL)} % both ways among "
                f"{figures['zero_shot']['n']} held-out pictures",
                min(recalls.values()) >= AIM_RECALL,
                ", ".join(f"{name} {percent(value)} %" for name, value in recalls.items()),
            )
        )
    for row in controls:
        if (row.benchmark, row.a, row.b) == (YES_NO, own[0].name, f"{own[0].name}, blank"):
            model = checkpoint_of(f"the LLaVA with {own[0].name}", len(own))
            text = f"{model} beats itself shown a blank picture on all yes/no questions, interval above 0"
            aims.append(Aim(text, row.interval[0] > 0, f"{points(row.difference)} points {between(row.interval)}"))
    return aims


# --------------------------------------------------------------------------------------------------- sentences


def sentences(
    towers: Mapping[str, Mapping[str, Any]], comparisons: Sequence[Comparison], controls: Sequence[Comparison]
) -> list[str]:
    """What was found, in words; the headline first."""
    primary = [row for row in comparisons if row.benchmark == SUITE]
    # Holm's family are all rows, words are for accuracy, MME's points and R@1 only.
    secondary = [
        row for row in comparisons if row.benchmark != SUITE and row.metric in (ACCURACY, RECALLS[0], *MME_POINTS)
    ]
    found = [] if len(primary) == 1 else [overview(primary)]
    for row in primary:
        found += [headline(row, pretrained(towers, row.a, row.b)), basis_sentence(row, towers, len(primary))]
    for row in secondary:
        if row.better:
            found.append(
                f"On {row.benchmark}, {_of(row)}{row.better} is better by {amount(row).lstrip('+−')} points of "
                f"{row.metric} ({row.a} − {row.b}: {amount(row)} {span(row)}, Holm's p {p_text(row.adjusted_p)})."
            )
    for pair in primary:
        unclear = [row for row in secondary if not row.better and (row.a, row.b) == (pair.a, pair.b)]
        if unclear:
            these = "these checkpoints" if pair.inference == "checkpoint" else ""
            between_them = f"{these} of {pair.a} and {pair.b}" if these else f"{pair.a} and {pair.b}"
            on = ", ".join(f"{row.benchmark} ({row.metric})" for row in unclear)
            found.append(f"No difference between {between_them} can be told on {on}.")
    for name, figures in towers.items():
        if figures["zero_shot"]:
            found.append(retrieval_sentence(name, figures["zero_shot"], pretrained(towers, name)))
    found += [control_sentence(row) for row in controls if row.benchmark == YES_NO and row.b.endswith(", blank")]
    for name, own in towers.items():
        told = batch_sentence(checkpoint_of(name, len(own["mllm"]["seeds"])), own["evaluation"])
        found += [] if told is None else [told]
    found += [judge_sentence(task, judge) for task, judge in next(iter(towers.values()))["judges"].items()]
    found += [cost for a, b in itertools.combinations(towers, 2) if (cost := cost_sentence(a, b, towers))]
    found.append(reach_sentence(primary[0], towers))
    return found


def _of(row: Comparison) -> str:
    """What a sentence about one training of each must not leave unsaid."""
    return "of these checkpoints, " if row.inference == "checkpoint" else ""


def checkpoint_of(name: str, trainings: int) -> str:
    """A tower's models in a sentence: of one training it must not leave that unsaid."""
    return f"this checkpoint of {name}" if trainings == 1 else name


def overview(primary: Sequence[Comparison]) -> str:
    """The primary comparisons of three towers and more: who is better than whom."""
    losers: dict[str, list[str]] = {}
    for row in primary:
        if row.better:
            losers.setdefault(row.better, []).append(row.b if row.better == row.a else row.a)
    told = [f"{name} is better than {' and '.join(own)}" for name, own in losers.items()]
    unclear = [f"{row.a} and {row.b}" for row in primary if not row.better]
    told += [f"{'; '.join(unclear)} cannot be told apart"] if unclear else []
    count = len({name for row in primary for name in (row.a, row.b)})
    kind = "checkpoints" if primary[0].inference == "checkpoint" else "towers"
    return f"Of these {count} {kind}, over the suite: {'; '.join(told)}."


def headline(row: Comparison, pretrainings: int = 1) -> str:
    """A primary comparison in words.

    Args:
        pretrainings: of each tower.
    """
    better = row.better
    kind = "checkpoints" if row.inference == "checkpoint" else "towers" if pretrainings == 1 else "ways of pretraining"
    trained = "" if row.inference == "checkpoint" else f", with {row.n_seeds} trainings of each"
    if better is None:
        return (
            f"These two {kind} cannot be told apart by their answers{trained}: over the suite {row.a} − {row.b} is "
            f"{deviations(row.difference)} of a standard deviation {between(row.interval)}."
        )
    signed = (
        between(row.interval, signed=False) if better == row.a else between((-row.interval[1], -row.interval[0]), False)
    )
    verb = "answers better" if row.inference == "checkpoint" else "makes the better LLaVA"
    size = deviations(abs(row.difference), signed=False)
    return f"Of these two {kind}{trained}, {better} {verb}, by {size} of a standard deviation {signed}."


def deviations(value: float, signed: bool = True) -> str:
    """A standardised difference in hundredths: 0.152 → +15.2 %"""
    return f"{points(value, signed)} %"


def basis_sentence(row: Comparison, towers: Mapping[str, Mapping[str, Any]], pairs: int = 1) -> str:
    """What a headline rests on, one of `pairs`."""
    a, b = (towers[name]["benchmarks"][ALL] for name in (row.a, row.b))
    trainings = ", these checkpoints" if row.n_seeds == 1 else f", {row.n_seeds} trainings of each, paired by seed,"
    p = "p" if pairs == 1 else f"Holm's p of {pairs} pairs of towers"
    return (
        f"Asked the same {row.n_samples} questions about {a['n_clusters']} pictures{trainings} answer {percent(a[ACCURACY])} % "
        f"({row.a}) and {percent(b[ACCURACY])} % ({row.b}) rightly; in the headline every benchmark counts alike, in standard "
        f"deviations of a question's score; {p} {p_text(row.adjusted_p)}, paired."
    )


def waiver_sentence(setting: Setting) -> str:
    values = ", ".join(f"{name} {value!r}" for name, value in setting.values.items())
    return f"Not only the towers differ: {setting.key} ({values}) was waived."


def pretrained(towers: Mapping[str, Mapping[str, Any]], *names: str) -> int:
    """How often each of `names` was pretrained: as often as the one that was least."""
    return min(int(towers[name]["tower"]["pretrainings"]) for name in names or towers)


def reach_sentence(row: Comparison, towers: Mapping[str, Mapping[str, Any]]) -> str:
    """What the intervals know of, and what not."""
    if row.inference == "checkpoint":
        return (
            "Each tower's LLaVA was trained once, so all this is about these checkpoints: intervals and tests say what other "
            "questions of the same kind could have changed, not what another training would have."
        )
    anew = [name for name in towers if pretrained(towers, name) > 1]
    once = [name for name in towers if name not in anew]
    if not anew:
        of_towers = "Each tower itself was pretrained once."
    elif not once:
        of_towers = "Each seed had a tower of its own, so that other pretrainings are among them."
    else:
        of_towers = (
            f"Other pretrainings are among them for {' and '.join(anew)}, of which each seed had its own, and not for "
            f"{' and '.join(once)}, pretrained once."
        )
    return (
        f"Each tower's LLaVA was trained with {row.n_seeds} seeds, so intervals and tests say what other trainings and other "
        f"questions of the same kind could have changed. {of_towers}"
    )


def pretraining_words(towers: Mapping[str, Mapping[str, Any]]) -> str:
    """How often the towers were pretrained: once; 3 times; once (openai) or 3 times (clips)."""
    by_count: dict[int, list[str]] = {}
    for name in towers:
        by_count.setdefault(pretrained(towers, name), []).append(name)
    words = {count: "once" if count == 1 else f"{count} times" for count in by_count}
    if len(by_count) == 1:
        return words[next(iter(by_count))]
    return " or ".join(f"{words[count]} ({', '.join(by_count[count])})" for count in sorted(by_count))


def retrieval_sentence(name: str, figures: Mapping[str, Any], pretrainings: int = 1) -> str:
    """R@1 both ways beside chance."""
    ways = [
        f"{label} {percent(figures[direction]['R@1'])} % {between(figures['intervals'][direction]['R@1'], signed=False)}"
        for direction, label in DIRECTIONS.items()
    ]
    subject = checkpoint_of(name, 1) if pretrainings == 1 else f"{name}, pretrained {pretrainings} times,"
    chance = f"chance {percent(figures['chance']['R@1'])} %"
    return f"Among {figures['n']} held-out pictures, {subject} retrieves with R@1 {' and '.join(ways)}; {chance}."


def control_sentence(row: Comparison) -> str:
    """Whether a model's yes/no answers come from the picture."""
    figures = f"{points(row.difference)} points {between(row.interval)}, Holm's p {p_text(row.adjusted_p)}"
    figures += f", {row.n_samples} questions"
    model = checkpoint_of(f"the LLaVA with {row.a}", row.n_seeds)
    subject = model[0].upper() + model[1:]
    if row.better == row.a:
        return f"{subject} uses the picture: on yes/no questions it beats itself shown a blank one by {figures}."
    if row.better == row.b:
        return f"{subject} answers yes/no questions worse than when shown a blank picture: {figures}."
    return f"It cannot be told whether {model} uses the picture: yes/no questions, real − blank {figures}."


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


def amount(row: Comparison) -> str:
    """A row's difference in its own points: percentage points, or MME's (34.2 → +34.2)."""
    return f"{row.difference:+.1f}".replace("-", "−") if row.metric in MME_POINTS else points(row.difference)


def span(row: Comparison) -> str:
    """A row's interval, as `amount`."""
    if row.metric in MME_POINTS:
        low, high = row.interval
        return f"[{low:+.1f}, {high:+.1f}]".replace("-", "−")
    return between(row.interval)


def p_text(p_value: float) -> str:
    """Ready to follow the letter p: = 0.031, < 0.001"""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def short_value(value: object) -> str:
    """A setting's value in a table's cell; hashes by their beginning."""
    text = "unknown" if value is None else value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text
