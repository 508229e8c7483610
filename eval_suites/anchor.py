"""The anchor: what became of a published model here (LLaVA-1.5 itself), beside what is published of it. `reference.py` measures it.

A comparison shows whose figures its own stand on; without an anchor it says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from clips_core.errors import InputError
from clips_core.folders import read_json
from eval_suites.benchmarks import UNKNOWN
from eval_suites.records import Run
from eval_suites.terminal import table

RECORD = "reference.json"
HOW = ("lmms_eval", "dtype", "attention")  # settings of an evaluation that its figures may depend on
NONE = (
    "No anchor was run: nothing ties these figures to a published one (`clips-llava study reference` runs it, "
    "`--reference FOLDER` shows it here)."
)


@dataclass(frozen=True)
class Measured:
    """One model's figure, in the units of the published one."""

    value: float
    n: int  # questions
    questions: int | None  # of the published benchmark
    inside: bool | None  # the accepted range; None: it is about other questions, so it can't be told

    @classmethod
    def of(cls, value: float, n: int, questions: int | None, accepted: tuple[float, float]) -> "Measured":
        """With the verdict on it."""
        return cls(value, n, questions, accepted[0] <= value <= accepted[1] if n == questions else None)

    @property
    def verdict(self) -> str:
        if self.inside is None:
            whole = "an unknown number" if self.questions is None else f"{self.questions:,}"
            return f"{self.n:,} questions of {whole}"
        return "inside" if self.inside else "outside"


@dataclass(frozen=True)
class AnchorRow:
    """One benchmark."""

    column: str
    task: str
    metric: str  # lmms-eval's
    published: float
    source: str
    why: str  # how the range was chosen
    accepted: dict[str, tuple[float, float]]  # by model: released, retrained
    released: Measured | None  # None: not measured yet
    retrained: Measured | None


@dataclass(frozen=True)
class Anchor:
    """All of it."""

    model: str  # the released one
    tower: str  # of the retrained one
    rows: list[AnchorRow]
    evaluation: dict[str, Any]  # how the questions were put


def read_anchor(folder: Path) -> Anchor:
    """The anchor in a folder of `study reference`.

    Raises:
        InputError: if there is none, or another version wrote it.
    """
    path = folder / RECORD
    if not path.is_file():
        raise InputError(
            f"{folder}: has no {RECORD}; give the folder of a `clips-llava study reference` that has measured a model"
        )
    try:
        return TypeAdapter(Anchor).validate_python(read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(
            f"{path}, {'.'.join(map(str, problem['loc']))}: {problem['msg']}; run the study again"
        ) from None


def sentences(anchor: Anchor | None, runs: Sequence[Run] = ()) -> list[str]:
    """What the anchor shows, and whether `runs` were evaluated as it was."""
    if anchor is None:
        return [NONE]
    models = {"released": f"The released {anchor.model}", "retrained": f"The one trained here with {anchor.tower}"}
    told = []
    for field, name in models.items():
        measured = {row.column: found for row in anchor.rows if (found := getattr(row, field)) is not None}
        if not measured:
            told.append(f"{name} has not been measured yet.")
            continue
        outside = [f"{column} ({found.value:.1f})" for column, found in measured.items() if found.inside is False]
        unclear = [column for column, found in measured.items() if found.inside is None]
        inside = len(measured) - len(outside) - len(unclear)
        parts = [f"{inside} of {len(measured)} figures in the accepted ranges"]
        parts += [f"outside: {', '.join(outside)}"] if outside else []
        parts += [f"not on the published questions: {', '.join(unclear)}"] if unclear else []
        told.append(f"{name} has {'; '.join(parts)}.")
    if runs:
        told += _otherwise(anchor.evaluation, runs[0].manifests["real"]["config"])
        covered = {row.task for row in anchor.rows}
        missing = [task for task in runs[0].metrics["real"] if task not in covered]
        told += [f"Not anchored: {', '.join(missing)}."] if missing else []
    return told


def _otherwise(evaluation: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A sentence on the settings of an evaluation in which the anchor's differs from this one."""
    values = {key: (evaluation.get(key) or UNKNOWN, here.get(key) or UNKNOWN) for key in HOW}
    other = [f"{key} {there}, here {ours}" for key, (there, ours) in values.items() if there != ours]
    return [f"The anchor was evaluated otherwise: {'; '.join(other)}."] if other else []


def cell(found: Measured | None) -> str:
    """A figure and its verdict: 61.4, inside"""
    return "–" if found is None else f"{found.value:.1f}, {found.verdict}"


def span(accepted: Sequence[float]) -> str:
    """A range: 60.2–63.5"""
    return "–".join(f"{bound:.1f}" for bound in accepted)


HEAD = ["benchmark", "published", "released, accepted", "released, here", "retrained, accepted", "retrained, here"]


def cells(row: AnchorRow) -> list[str]:
    """A row of the table."""
    accepted = [span(row.accepted[model]) for model in ("released", "retrained")]
    return [row.column, f"{row.published:g}", accepted[0], cell(row.released), accepted[1], cell(row.retrained)]


def anchor_table(anchor: Anchor | None) -> Table | None:
    """For the terminal."""
    if anchor is None:
        return None
    return table(f"The anchor: {anchor.model} as published and as it comes out here", HEAD, map(cells, anchor.rows))
