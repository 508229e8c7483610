"""Listings: .jsonl or .csv files that name pictures, by paths relative to the listing's folder, and their captions."""

import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from clips_core.errors import InputError


class Lines:
    """The lines of an open listing as text. Bytes that are not UTF-8 come as lone surrogates: they spoil one row, not all.

    Attributes:
        offset: bytes of the file up to the end of the last line.
        number: lines so far.
    """

    def __init__(self, file: IO[bytes], offset: int = 0):
        self._file, self.offset, self.number = file, offset, 0
        file.seek(offset)

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            text = line.decode("utf-8", errors="surrogateescape")
            text = text.removeprefix("\ufeff") if self.offset == 0 else text
            self.offset, self.number = self.offset + len(line), self.number + 1
            yield text


def csv_rows(
    listing: Path | str,
    lines: Iterable[str],
    columns: Sequence[str] | None = None,
    before: int = 0,
    required: Iterable[str] = (),
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of the last line, and values by column, of each row.

    Args:
        columns: None: the first row has them.
        before: lines of the file before these.
        required: columns that must be there.

    Raises:
        InputError: naming the line, if it is not CSV or lacks a column.
    """
    reader = csv.DictReader(lines, columns, strict=True)
    try:
        missing = set(required) - set(reader.fieldnames or ())
        if missing:
            raise InputError(f"{listing}, line 1: no column {' and no column '.join(sorted(missing))} in the header")
        for row in reader:
            yield before + reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{listing}, line {before + reader.reader.line_num}: not CSV ({error})") from None


def is_inside(image: str) -> bool:
    """Whether a picture's path is relative to the listing's folder, and stays in it."""
    path = PurePosixPath(image)
    return not (path.is_absolute() or ".." in path.parts or "\0" in image)


def slices(listing: str, file: IO[bytes], size: int) -> tuple[list[tuple[int, int]], list[str]]:
    """Where every `size` rows begin (a byte offset) and how many they are; and the columns (none for .jsonl).

    Raises:
        InputError: if a .csv is not CSV. The lines of a .jsonl are only counted.
    """
    lines = Lines(file)
    columns: list[str] = []
    if listing.endswith(".csv"):
        columns = _columns(listing, lines)
        rows: Iterator[Any] = csv_rows(listing, lines, columns, lines.number)
    else:
        rows = (line for line in lines if line.strip())
    found: list[tuple[int, int]] = []
    start, count = lines.offset, 0
    for _ in rows:
        count += 1
        if count == size:
            found.append((start, count))
            start, count = lines.offset, 0
    return found + ([(start, count)] if count else []), columns


def read_slice(listing: str, file: IO[bytes], offset: int, count: int) -> list[Any]:
    """`count` rows from a byte offset on: values by column of a .csv, the lines of a .jsonl."""
    if listing.endswith(".csv"):
        columns = _columns(listing, Lines(file))
        return [row for _, row in itertools.islice(csv_rows(listing, Lines(file, offset), columns), count)]
    return list(itertools.islice((line for line in Lines(file, offset) if line.strip()), count))


def _columns(listing: str, lines: Lines) -> list[str]:
    try:
        return next(csv.reader(lines, strict=True), [])
    except csv.Error as error:
        raise InputError(f"{listing}, line 1: not CSV ({error})") from None
