"""Questions to look at: which ones, and their pictures from the benchmarks' files."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from clips_core.errors import InputError
from clips_core.images import open_image
from eval_suites.benchmarks import Suite
from eval_suites.local_data import Table, find, picture_columns
from eval_suites.records import Key, Record

PER_PATTERN = 4  # questions shown for each pattern of right and wrong answers
LARGEST = 256  # pixels of a shown picture's longer side


@dataclass(frozen=True)
class Sample:
    """A question as every model answered it, with its picture as a data URI (None: the task shows none)."""

    records: list[Record]  # one a model
    picture: str | None


@dataclass(frozen=True)
class Pattern:
    """Questions that the same models answered rightly."""

    right: tuple[bool, ...]  # one a model
    count: int
    samples: list[Sample]


def choose(answers: Sequence[Mapping[Key, Record]], suite: Suite, data: Path | None) -> list[Pattern]:
    """Questions for each pattern of right and wrong answers, those on which the models differ first.

    They are taken at even distances from the sorted list, in turn from each task, whatever they show.

    Args:
        answers: each model's records of the same questions.
        suite: says which files the questions are from.
        data: folder with these files; None: questions are shown without their pictures.

    Raises:
        InputError: if a file is missing, or its rows are not the questions that were answered.
    """
    by_pattern: dict[tuple[bool, ...], list[Key]] = {}
    for key in answers[0]:
        by_pattern.setdefault(tuple(records[key].right for records in answers), []).append(key)
    order = sorted(by_pattern, key=lambda right: (len(set(right)) == 1, -sum(right), [not value for value in right]))
    chosen = {right: evenly_by_task(by_pattern[right]) for right in order}
    documents = {
        name: read_documents(task.tables, sorted(i for keys in chosen.values() for t, i in keys if t == name), data)
        for name, task in suite.tasks.items()
        if data is not None
    }

    def sample(task: str, i: int) -> Sample:
        records = [own[task, i] for own in answers]
        return _sample(records, documents[task][i]) if documents else Sample(records, None)

    return [Pattern(right, len(by_pattern[right]), [sample(*key) for key in chosen[right]]) for right in order]


def evenly_by_task(keys: Sequence[Key], count: int = PER_PATTERN) -> list[Key]:
    """Up to `count` of the sorted `keys`, tasks in turn, at even distances within each."""
    tasks: dict[str, list[Key]] = {}
    for key in keys:
        tasks.setdefault(key[0], []).append(key)
    turns: list[str] = []
    while len(turns) < min(count, len(keys)):
        turns += [task for task, own in tasks.items() if turns.count(task) < len(own)]
    numbers = {task: turns[:count].count(task) for task in tasks}
    return [
        own[(2 * i + 1) * len(own) // (2 * numbers[task])] for task, own in tasks.items() for i in range(numbers[task])
    ]


@dataclass(frozen=True)
class Document:
    """A row of a benchmark's files: where it lies, its question, its picture's bytes."""

    place: str
    question: str | None  # None: the task has none of its own, such as captioning
    picture: bytes | None


def read_documents(tables: Sequence[Table], rows: Sequence[int], data: Path) -> dict[int, Document]:
    """The given rows of a task's first table, each with the first of its pictures.

    A picture may lie in another table, which covers a column of the first.
    """
    questions = find(data, tables[0])
    files = questions.files
    picture = next(iter(picture_columns(questions)), None)
    asks = "question" in column_names(files[0])  # NoCaps has none: the prompt is the same for every picture
    question = ["question"] if asks else []
    if picture is not None:
        found = read_rows(files, [*question, picture], rows)
        several = {i: row[picture] if isinstance(row[picture], list) else [row[picture]] for i, row in found.items()}
        pictures = {i: own[0] for i, own in several.items() if own and own[0] is not None}
    else:
        joined = [
            (table, *pair) for table in tables[1:] for pair in table.covers.items() if "image" in table.columns.values()
        ]
        found = read_rows(files, [*question, *(asked for _, _, asked in joined[:1])], rows)
        pictures = {}
        for table, column, asked in joined[:1]:
            own = find(data, table)
            places = {value: place for place, value in enumerate(own.values(column))}
            missing = sorted({row[asked] for row in found.values()} - places.keys())
            if missing:
                raise InputError(f"{own.files[0]}, column {column!r}: lacks {missing[0]!r}, which a question is about")
            picture = next(name for name, kind in table.columns.items() if kind == "image")
            images = read_rows(own.files, [picture], sorted({places[row[asked]] for row in found.values()}))
            pictures = {i: images[places[row[asked]]][picture] for i, row in found.items()}
    return {
        i: Document(
            f"{files[0].parent}, row {i}",
            str(row["question"]).strip() if asks else None,
            pictures[i]["bytes"] if i in pictures else None,
        )
        for i, row in found.items()
    }


def _sample(records: list[Record], document: Document) -> Sample:
    if document.question is not None and document.question != records[0].question.strip():
        raise InputError(
            f"{document.place}: holds the question {document.question!r}, but {records[0].task} {records[0].doc_id} that was "
            f"answered is {records[0].question!r}; give the folder of the benchmarks that were evaluated"
        )
    picture = _data_uri(open_image(document.picture, document.place)) if document.picture is not None else None
    return Sample(records, picture)


def _data_uri(image: Image.Image) -> str:
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def column_names(file: Path) -> list[str]:
    """Of a parquet file."""
    try:
        return list(pq.read_schema(file).names)
    except (OSError, ValueError) as error:  # pyarrow's errors are kinds of these
        raise InputError(f"{file}: not a readable parquet file ({' '.join(str(error).split())})") from None


def read_rows(files: Sequence[Path], columns: list[str], rows: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The given rows, counted through all parquet files; only the row groups that hold one are read."""
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for path in files:
        try:
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                wanted = [row for row in rows if start <= row < start + size]
                if wanted:
                    values = file.read_row_group(group, columns).select(columns).take([row - start for row in wanted])
                    found.update(zip(wanted, values.to_pylist(), strict=True))
                start += size
        except (OSError, KeyError, ValueError) as error:  # pyarrow's errors are kinds of these
            raise InputError(
                f"{path}: cannot read the columns {', '.join(columns)} ({' '.join(str(error).split())})"
            ) from None
    if len(found) < len(rows):
        raise InputError(f"{files[0].parent}: has {start} rows, but row {max(rows)} was answered")
    return found
