"""Published benchmark numbers, beside those rows of ours that they can stand beside.

A number of a paper is about one tower at one resolution in one LLaVA. It is shown only beside a row with the same of each that
the paper states; what it leaves unsaid goes with it. Where papers print different numbers for the same, all are shown.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from clips_core.config import FORBID, load_config

NUMBERS = Path(__file__).parent / "catalogue" / "published.yaml"
SETTINGS = ("tower", "resolution", "llm", "recipe")

Unknown = Literal["unknown"]


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
    llm: str
    recipe: str
    numbers: list[Numbers]


@dataclass(config=FORBID)
class Papers:
    """A file of published numbers."""

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

    @property
    def unstated(self) -> list[str]:
        """The settings that the paper does not state."""
        return [name for name in SETTINGS if getattr(self, name) is None]


def load_published(path: Path = NUMBERS) -> list[Published]:
    """The numbers of a file, one by one."""
    return [
        Published(
            row.tower, None if isinstance(row.resolution, str) else row.resolution,
            _stated(paper.llm), _stated(paper.recipe), column, value, paper.source,
        )
        for paper in load_config(Papers, path).papers
        for row in paper.numbers
        for column, value in row.values.items()
    ]  # fmt: skip


def _stated(value: str) -> str | None:
    return None if value == "unknown" else value


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
