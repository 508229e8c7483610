"""Published benchmark numbers, beside those rows of ours that they can stand beside.

A number of a paper is about one tower at one resolution in one LLaVA. It is shown only beside a row with the same of each that
the paper states, measured on the same questions by the same metric; what it leaves unsaid goes with it. Where papers print
different numbers for the same, all are shown. What a row of ours is about is read from what its trainings recorded, never from
the names of folders; what no record says is taken for another.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass
from rich.table import Table

import llava_bridge
from clips_core.config import FORBID, load_config, recipe_path, to_dict
from clips_core.folders import first_difference, read_json
from eval_suites.benchmarks import UNKNOWN, BenchmarkTask, Column, Suite, load_suite
from eval_suites.fairness import PLACES
from eval_suites.records import Run
from eval_suites.terminal import table
from llava_bridge.config import AlignConfig, TuneConfig

NUMBERS = Path(__file__).parent / "catalogue" / "published.yaml"
SETTINGS = ("tower", "resolution", "llm", "recipe")
# Settings of a stage that are not its recipe's: what is compared by itself, and how a step is worked off.
NOT_RECIPE = (
    *PLACES,
    "seed",
    "image_size",
    "llm",
    "workers",
    "save_every",
    "device_batch_size",
    "parallel",
    "gradient_checkpointing",
)

Unknown = Literal["unknown"]


@dataclass(config=FORBID)
class KnownTower:
    """How a record names a tower, and what it must be besides."""

    specs: list[str]
    layers: int
    width: int
    patch: int


@dataclass(config=FORBID)
class KnownLlm:
    """The same of a language model, and how the names of the shipped recipes around it begin."""

    names: list[str]
    layers: int
    width: int
    recipes: str


@dataclass(config=FORBID)
class Samples:
    """What a recipe's stages are trained on: so many samples of the published data."""

    align: int
    tune: int


@dataclass(config=FORBID)
class Numbers:
    """One row of a paper's table."""

    tower: str
    resolution: int | Unknown
    values: dict[str, float]


@dataclass(config=FORBID)
class Paper:
    """A paper's table; all of its rows are of one language model and recipe."""

    source: str
    suite: str  # a shipped one, whose columns are the table's
    llm: str
    recipe: str
    numbers: list[Numbers]
    unsaid: list[str] = field(default_factory=list)  # what else it leaves open


@dataclass(config=FORBID)
class Papers:
    """A file of published numbers, and of the names under which a record may hold what they are about."""

    towers: dict[str, KnownTower]
    llms: dict[str, KnownLlm]
    recipes: dict[str, Samples]
    papers: list[Paper]


@plain_dataclass(frozen=True)
class Row:
    """What a number is about. None: we do not know it of our own."""

    tower: str | None
    resolution: int | None
    llm: str | None
    recipe: str | None
    column: str


@plain_dataclass(frozen=True)
class Published:
    """One number of a paper."""

    tower: str
    resolution: int | None  # None: the paper does not say
    llm: str | None
    recipe: str | None
    column: str
    value: float
    source: str
    suite: str
    unsaid: tuple[str, ...] = ()

    @property
    def unstated(self) -> list[str]:
        """The settings that the paper does not state."""
        return [name for name in SETTINGS if getattr(self, name) is None]


@cache
def load_papers(path: Path = NUMBERS) -> Papers:
    """The file as it is."""
    return load_config(Papers, path)


def load_published(path: Path = NUMBERS) -> list[Published]:
    """The numbers of a file, one by one."""
    return [
        Published(
            row.tower, None if isinstance(row.resolution, str) else row.resolution, _stated(paper.llm), _stated(paper.recipe),
            column, value, paper.source, paper.suite, tuple(paper.unsaid),
        )
        for paper in load_papers(path).papers
        for row in paper.numbers
        for column, value in row.values.items()
    ]  # fmt: skip


def _stated(value: str) -> str | None:
    return None if value == UNKNOWN else value


def matching(published: Iterable[Published], row: Row) -> list[Published]:
    """The numbers that may stand beside `row`: of the same column, and the same in every setting that the paper states."""
    return [
        number
        for number in published
        if number.column == row.column and all(getattr(number, name) in (None, getattr(row, name)) for name in SETTINGS)
    ]


def disagreeing(published: Iterable[Published]) -> list[list[Published]]:
    """Groups of numbers that papers print for the same tower in the same LLaVA, where these are not all equal.

    Numbers are of one group if no setting that both state differs: a resolution that a paper leaves unsaid may be any.
    """
    numbers = list(published)
    groups: list[list[Published]] = []
    for i, number in enumerate(numbers):
        same = [other for other in numbers[i + 1 :] if other.source != number.source and _may_be_same(number, other)]
        if any(other.value != number.value for other in same):
            groups.append([number, *same])
    return groups


def _may_be_same(one: Published, other: Published) -> bool:
    pairs: Sequence[tuple[object, object]] = [(getattr(one, name), getattr(other, name)) for name in SETTINGS]
    return one.column == other.column and all(a == b or a is None or b is None for a, b in pairs)


# ------------------------------------------------------------------------------------------------ beside rows of ours


@plain_dataclass(frozen=True)
class Quoted:
    """A published number as it is shown."""

    value: float
    source: str
    resolution: int | None  # None: the paper does not say
    unsaid: list[str]  # of how it was made

    @property
    def text(self) -> str:
        """As papers print it: shares with one decimal (85.0), MME's points and OCRBench's answers as they are (306, 1433.5)."""
        return f"{self.value:.1f}" if self.value < 150 else f"{self.value:g}"


@plain_dataclass(frozen=True)
class Shown:
    """A figure of ours, and the published ones about the same."""

    tower: str  # by its name in the comparison
    column: str
    task: str
    metric: str  # lmms-eval's
    value: float  # in the column's units, the mean over the tower's trainings
    about: str  # the papers' name for the tower
    published: list[Quoted]
    disagreeing: list[Quoted]  # all that papers print of this tower, if they do not print the same


@plain_dataclass(frozen=True)
class Beside:
    """Published numbers in a comparison, and for what has none, why."""

    shown: list[Shown] = field(default_factory=list)
    said: list[str] = field(
        default_factory=list
    )  # sentences: what papers leave open, where they disagree, why others have none


def beside(towers: Mapping[str, Sequence[Run]]) -> Beside:
    """The published numbers that may stand beside the towers' figures.

    Args:
        towers: by name, each one's trainings.
    """
    shown: list[Shown] = []
    left_out: dict[str, list[str]] = {}  # by reason
    for name, own in towers.items():
        settings, reason = identity(own[0])
        if reason is None:
            numbers = [n for n in load_published() if matching([n], Row(**settings, column=n.column))]
            known = len(left_out)
            rows = list(_shown(name, own, str(settings["tower"]), numbers, left_out))
            shown += rows
            if numbers and not rows and len(left_out) == known:
                reason = "none of the published benchmarks was asked"
            if not numbers:
                reason = (
                    f"no publication here has {settings['tower']} at {settings['resolution']} px with {settings['llm']}"
                )
        if reason is not None:
            left_out.setdefault(reason, []).append(name)
    why_not = [f"No published number stands beside {' and '.join(of)}: {reason}." for reason, of in left_out.items()]
    return Beside(shown, [*_sentences(shown), *why_not])


def identity(run: Run) -> tuple[dict[str, Any], str | None]:
    """What a training is about, as far as its records say so.

    Returns:
        `tower`, `resolution`, `llm` and `recipe` by their published names; and if one of them is none that is published, why, the
        rest then being None.
    """
    known = load_papers()
    settings: dict[str, Any] = dict.fromkeys(SETTINGS)
    if "align" not in run.manifests or "tune" not in run.manifests:
        return settings, "it was not trained here, so there is no record of its tower and recipe"
    config = {} if run.llava is None else read_json(run.llava / "config.json")
    asked = run.manifests["align"]["config"]
    vision, text = (config.get(part) or {} for part in ("vision_config", "text_config"))
    spec, llm = (str(asked.get(key) or UNKNOWN).partition("@")[0] for key in ("tower", "llm"))

    of_spec = ((name, tower) for name, tower in known.towers.items() if spec in tower.specs)
    name, tower = next(of_spec, (None, None))
    if tower is None:
        return settings, f"its tower ({spec}) is in no publication here"
    shape = {"num_hidden_layers": tower.layers, "hidden_size": tower.width, "patch_size": tower.patch}
    if (difference := _other(shape, vision)) is not None:
        return settings, f"its tower is called {spec}, but {difference}"
    settings |= {"tower": name, "resolution": vision.get("image_size")}

    of_name = ((name, model) for name, model in known.llms.items() if llm in model.names)
    name, model = next(of_name, (None, None))
    if model is None:
        return settings, f"its language model ({llm}) is in no publication here"
    if (difference := _other({"num_hidden_layers": model.layers, "hidden_size": model.width}, text)) is not None:
        return settings, f"its language model is called {llm}, but {difference}"
    settings["llm"] = name

    others = {recipe: _other_recipe(run, model.recipes, samples) for recipe, samples in known.recipes.items()}
    settings["recipe"] = next((recipe for recipe, difference in others.items() if difference is None), None)
    if settings["recipe"] is None:
        recipe, difference = next(iter(others.items()))
        return settings, f"its recipe is not that of {recipe} ({difference})"
    return settings, None


def _other(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    for key, value in wanted.items():
        if found.get(key) != value:
            return f"its {key} is {found.get(key)}, not {value}"
    return None


def _other_recipe(run: Run, recipes: str, samples: Samples) -> str | None:
    """In what the stages' recorded settings first differ from the shipped recipes, or their data in size from the published."""
    folder = Path(llava_bridge.__file__).parent
    for stage, kind in (("align", AlignConfig), ("tune", TuneConfig)):
        manifest = run.manifests[stage]
        places = ["out=x", "data.json=x", "data.images=x", "tower=x", *(["align=x"] if stage == "tune" else [])]
        shipped: Any = load_config(kind, recipe_path(folder, f"{recipes}_{stage}"), places)
        difference = first_difference(_recipe(to_dict(shipped)), _recipe(manifest["config"]), stage)
        if difference is not None:
            return difference
        count, published = manifest["outputs"].get("samples"), getattr(samples, stage)
        if count != published:
            return f"{stage} saw {count} samples, not {published}"
    return None


def _shown(
    name: str, own: Sequence[Run], about: str, numbers: Sequence[Published], left_out: dict[str, list[str]]
) -> Iterator[Shown]:
    """A tower's rows. `left_out` gets the columns of which other questions were asked."""
    columns: dict[str, list[Published]] = {}
    for number in numbers:
        columns.setdefault(number.column, []).append(number)
    groups = disagreeing(load_published())
    for column, of_column in columns.items():
        suite = _suite(of_column[0].suite)
        ours = suite.columns[column]
        if any(ours.task not in run.suite.tasks for run in own):
            continue  # not asked at all: no row of ours
        reasons = [asked_otherwise(run, ours.task, ours.metric, suite.tasks[ours.task]) for run in own]
        if (reason := next(filter(None, reasons), None)) is not None:
            left_out.setdefault(reason, []).append(f"{name} on {column}")
            continue
        value = float(np.mean([run.metrics["real"][ours.task][ours.metric] for run in own])) * ours.scale
        others = {number: None for group in groups if any(n in of_column for n in group) for number in group}
        yield Shown(
            name, column, ours.task, ours.metric, value, about,
            [_quoted(number) for number in of_column], [_quoted(number) for number in others],
        )  # fmt: skip


@cache
def _suite(name: str) -> Suite:
    return load_suite(name)


def asked_otherwise(run: Run, task: str, metric: str, wanted: BenchmarkTask) -> str | None:
    """Why a run's figure is about other questions than the published ones; None: it is about the same."""
    asked, figures = run.suite.tasks[task], run.metrics["real"].get(task, {})
    if metric not in figures:
        return "it has not been scored"
    rows, count = wanted.tables[0].rows, figures.get("n")
    if count != rows:
        return f"{count or 0:,} questions were asked, not the published {rows or 0:,}"
    for key in ("task", "prompt", "generation", "version"):
        if getattr(asked, key) != getattr(wanted, key):
            return f"asked with another {key}"
    places = [
        [(table.repository, table.configuration, table.split) for table in each.tables] for each in (asked, wanted)
    ]
    if places[0] != places[1]:
        return "asked from other files"
    return "asked with another prompt" if task in run.manifests["real"]["config"].get("prompts", {}) else None


def _recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings less all that is not its recipe's."""
    data = {key: value for key, value in (settings.get("data") or {}).items() if f"data.{key}" not in NOT_RECIPE}
    return {**{key: value for key, value in settings.items() if key not in NOT_RECIPE}, "data": data}


WORDS = {
    "lmms_eval": "harness",
    "version": "task version",
    "generation": "generation settings",
    "image_mode": "image mode",
}


def _quoted(number: Published) -> Quoted:
    column: Column = _suite(number.suite).columns[number.column]
    left_open = [WORDS.get(name, name) for name, said in vars(column.source).items() if said == UNKNOWN]
    unsaid = dict.fromkeys([*number.unstated, *number.unsaid, *(name for name in left_open if name not in SETTINGS)])
    return Quoted(number.value, number.source, number.resolution, list(unsaid))


def quoted_words(number: Quoted) -> str:
    """A number with its source and resolution: 57.5 (CLIPS, resolution unsaid)"""
    at = "resolution unsaid" if number.resolution is None else f"{number.resolution} px"
    return f"{number.text} ({short_source(number.source)}, {at})"


def short_source(source: str) -> str:
    """A publication's name without its place: CLIPS (arXiv …) → CLIPS"""
    return re.split(r" \(|, ", source)[0]


def _sentences(shown: Sequence[Shown]) -> list[str]:
    """What the papers leave unsaid, and where they disagree."""
    left_open: dict[str, dict[str, None]] = {}
    split: dict[str, dict[str, str]] = {}  # by tower and column
    for row in shown:
        for number in row.published:
            left_open.setdefault(short_source(number.source), {}).update(dict.fromkeys(number.unsaid))
        if row.disagreeing:
            split.setdefault(row.about, {})[row.column] = ", ".join(map(quoted_words, row.disagreeing))
    told = [
        f"The table of {source} leaves unsaid: {', '.join(unsaid)}." for source, unsaid in left_open.items() if unsaid
    ]
    return told + [
        f"Publications disagree about {about}: {'; '.join(f'{column} {numbers}' for column, numbers in by_column.items())}."
        for about, by_column in split.items()
    ]


def published_table(found: Beside) -> Table | None:
    """For the terminal."""
    rows = [
        [row.column, row.tower, f"{row.value:.1f}", "; ".join(map(quoted_words, row.published))] for row in found.shown
    ]
    title = "Published numbers of the same tower, language model, recipe and questions; ours by lmms-eval's own metric"
    return table(title, ["", "tower", "ours", "published"], rows, words=2) if rows else None
