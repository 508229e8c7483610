"""Benchmark files on this machine: found and checked before the first question, then read by lmms-eval's own tasks.

A data folder mirrors the hub: `FOLDER/lmms-lab-encoder/POPE/…parquet`. A task asks for `lmms-lab-encoder/POPE`, and
`datasets` takes that for a path when such a folder stands in the working directory.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from clips_core.config import FORBID
from clips_core.errors import InputError
from clips_core.folders import sha256_file
from clips_core.images import open_image
from eval_suites.needs import java_folder

# int64: an integer of any width; image?: a row may have none; images: a list, at least one a row
Kind = Literal["string", "int64", "strings", "image", "image?", "images"]
SHOWN = 3  # of the faulty pictures of a column


@dataclass(config=FORBID)
class Table:
    """One split of a data set that a task reads."""

    repository: str
    """The name that the task loads: a folder in the data folder."""
    split: str
    columns: dict[str, Kind] = field(default_factory=dict)
    """What the task reads, and of which kind. Empty: nobody says; whatever pictures the files hold are looked at."""
    configuration: str | None = None
    """None: the repository's default one."""
    covers: dict[str, str] = field(default_factory=dict)
    """A column here → a column of the task's first table, all of whose values must be found here."""
    rows: int | None = None
    """How many the published split has; None: not known. Another number is an error, unless a run is told to take a part."""
    revision: str | None = None
    """The data set's commit for `eval fetch`; None: the newest, which it records."""


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class Found:
    """A table and the parquet files that hold it, as `datasets` resolves them."""

    table: Table
    files: tuple[Path, ...]
    features: Any
    """`datasets.Features`, or None where only the parquet files say it."""

    @property
    def rows(self) -> int:
        """How many there are."""
        import pyarrow.parquet as pq

        return sum(pq.read_metadata(file).num_rows for file in self.files)

    def values(self, column: str) -> list[Any]:
        """All values of a column that holds no pictures."""
        import pyarrow.parquet as pq

        return [value for file in self.files for value in pq.read_table(file, columns=[column])[column].to_pylist()]


def find(folder: Path, table: Table) -> Found:
    """The parquet files of `table` in the data folder.

    Raises:
        InputError: naming the folder, configuration or split that is missing, and where to get it.
    """
    import datasets

    if not folder.is_dir():
        raise InputError(f"data folder {folder}: no such folder")
    place = folder / table.repository
    if not place.is_dir():
        raise InputError(f"{place}: no such folder; {folder} must mirror the data sets by their names on the hub")
    try:
        builder = datasets.load_dataset_builder(str(place), table.configuration)
    except (
        ValueError,
        OSError,
    ) as error:  # `datasets` raises these for a missing configuration and for no files at all
        raise InputError(f"{place}: {' '.join(str(error).split())}") from None
    by_split = builder.config.data_files or {}
    files = tuple(Path(file) for file in by_split.get(table.split, ()))
    if not files:
        name = f"configuration {builder.config.name!r}, split {table.split!r}"
        raise InputError(
            f"{place}: no parquet file for {name} (splits found: {', '.join(map(str, by_split)) or 'none'})"
        )
    return Found(table, files, builder.info.features)


def find_all(folder: Path, tables: Iterable[Table]) -> tuple[list[Found], list[str]]:
    """Each table that `find` finds, and one sentence for each that it does not."""
    found, missing = [], []
    for table in tables:
        try:
            found.append(find(folder, table))
        except InputError as error:
            missing.append(str(error))
    return found, list(dict.fromkeys(missing))


def fingerprint(folder: Path, tables: list[Found]) -> str:
    """Hex SHA-256 over the names and contents of all files that the tables are read from."""
    files = {file for found in tables for file in found.files}
    files |= {folder / found.table.repository / "README.md" for found in tables}  # says which file is which split
    listing = {os.path.relpath(file, folder): sha256_file(file) for file in sorted(files) if file.is_file()}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def check(tables: list[Found]) -> None:
    """Every file readable, every column there and of its kind, every picture whole; the first table has the questions.

    Raises:
        InputError: with all that is wrong, one fault a line, naming file and column, for a picture also the row.
    """
    if found := list(faults(tables)):
        raise InputError("\n".join(found))


def faults(tables: list[Found]) -> Iterator[str]:
    """What is wrong with a task's files, one sentence a fault; the first table has the questions."""
    for found in tables:
        wrong = [fault for file in found.files for fault in _wrong_columns(file, found)]
        yield from wrong
        if wrong:
            continue
        if found.rows == 0:
            yield f"{found.files[0]}: has no rows"
        for column, kind in picture_columns(found).items():
            yield from _wrong_pictures(found, column, kind)
        for column, asked in found.table.covers.items():
            try:
                missing = sorted(set(tables[0].values(asked)) - set(found.values(column)))
            except (OSError, KeyError, ValueError):  # of the first table, and told of above
                continue
            if missing:
                shown = ", ".join(map(repr, missing[:3]))
                yield (
                    f"{found.files[0]}, column {column!r}: lacks {len(missing)} of the values in column {asked!r} of"
                    f" {tables[0].files[0]}, for example {shown}"
                )


def wrong_counts(tables: list[Found]) -> Iterator[str]:
    """The tables that do not have the published number of rows."""
    import pyarrow as pa

    for found in tables:
        try:
            rows = found.rows
        except (OSError, pa.ArrowException):
            continue  # `faults` tells of it
        if found.table.rows is not None and rows != found.table.rows:
            yield (
                f"{found.files[0].parent}: split {found.table.split!r} of {found.table.repository} has {rows:,} rows, but"
                f" {found.table.rows:,} are published"
            )


def _wrong_columns(file: Path, found: Found) -> list[str]:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        return [f"{file}: not a readable parquet file ({' '.join(str(error).split())})"]
    features = found.features or datasets.Features.from_arrow_schema(schema)
    wrong = []
    for column, kind in found.table.columns.items():
        if column not in schema.names:
            wrong.append(f"{file}: no column {column!r} (it has: {', '.join(schema.names)})")
        elif not _is_of(kind, features.get(column)):
            wrong.append(f"{file}, column {column!r}: is {features.get(column)}, but {kind!r} is needed")
    return wrong


def picture_columns(found: Found) -> dict[str, Kind]:
    """Those that the table names; of a table that names none at all, those that the files hold."""
    import datasets
    import pyarrow.parquet as pq

    if found.table.columns:
        return {name: kind for name, kind in found.table.columns.items() if kind in ("image", "image?", "images")}
    features = found.features or datasets.Features.from_arrow_schema(pq.read_schema(found.files[0]))
    own: dict[str, Kind] = {}
    for name, feature in features.items():
        if _is_of("images", feature):
            own[name] = "images"
        elif _is_of("image", feature):
            own[name] = "image?"
    return own


def _is_of(kind: Kind, feature: Any) -> bool:
    import datasets

    if kind in ("image", "image?"):
        return isinstance(feature, datasets.Image)
    if kind == "images":
        return _is_of("image", getattr(feature, "feature", None))
    if kind == "strings":
        return _is_of("string", getattr(feature, "feature", None))
    dtype = getattr(feature, "dtype", "")
    # ScienceQA's answers are int8, TextVQA's question_id is int32.
    return dtype in ("string", "large_string") if kind == "string" else dtype.startswith(("int", "uint"))


def _wrong_pictures(found: Found, column: str, kind: Kind) -> Iterator[str]:
    """Decode each different picture once: a damaged one must not come to light in the middle of a run."""
    import pyarrow.parquet as pq

    seen: set[bytes] = set()
    wrong = 0
    for file in found.files:
        row = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=64, columns=[column]):
            for value in batch.column(0).to_pylist():
                if fault := _wrong_value(value, kind, f"{file}, row {row}, column {column!r}", seen):
                    wrong += 1
                    if wrong <= SHOWN:
                        yield fault
                row += 1
    if wrong > SHOWN:
        yield f"{found.files[0].parent}, column {column!r}: {wrong - SHOWN} more such pictures"


def _wrong_value(value: Any, kind: Kind, name: str, seen: set[bytes]) -> str | None:
    """What is wrong with one row's picture or pictures; `seen` holds the digests of whole ones and grows."""
    if kind == "image?" and value is None:
        return None
    pictures = value if kind == "images" else [value]
    for picture in pictures or [None]:
        data = picture and picture["bytes"]
        if not data:
            return f"{name}: holds no picture (its bytes must be in the file)"
        digest = hashlib.sha256(data).digest()
        if digest not in seen:
            try:
                open_image(data, name)
            except InputError as error:
                return str(error)
            seen.add(digest)
    return None


@contextlib.contextmanager
def working_from(folder: Path, cache: Path) -> Iterator[None]:
    """Inside, lmms-eval's tasks load from `folder`, no network is asked, and `datasets` caches under `cache` alone.

    A Java that is not on the PATH but known is found by the scorers that call it.

    The cache matters: `datasets` knows a local file by its path and time of change, so with a shared one an exchanged
    file could be answered with the rows of the old one. Everything is put back on the way out.
    """
    import datasets.config
    import huggingface_hub.constants
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    cache.mkdir(parents=True, exist_ok=True)
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LMMS_EVAL_DATASETS_CACHE": str(cache)}
    java = java_folder()
    if java is not None and shutil.which("java") != str(java / "java"):
        environment["PATH"] = os.pathsep.join([str(java), os.environ.get("PATH", "")])
    # Both libraries read the environment when they are imported, which may be long ago: so their constants are set too.
    constants = {"HF_HUB_OFFLINE": True, "HF_DATASETS_OFFLINE": True, "HF_DATASETS_CACHE": cache}
    with (
        # `datasets` puts a copy in the place of os.environ when it maps in several processes: look it up each time.
        _replaced(lambda: os.environ, environment),
        _replaced(lambda: vars(huggingface_hub.constants), {"HF_HUB_OFFLINE": True}),
        _replaced(lambda: vars(datasets.config), constants),
        contextlib.chdir(folder),
    ):
        _resolve_hf_datasets_cache_dir.cache_clear()  # it remembers the cache of the first task of this process
        try:
            yield
        finally:
            _resolve_hf_datasets_cache_dir.cache_clear()


@contextlib.contextmanager
def _replaced(values: Callable[[], MutableMapping[str, Any]], new: Mapping[str, Any]) -> Iterator[None]:
    old = {key: values()[key] for key in new if key in values()}
    values().update(new)
    try:
        yield
    finally:
        for key in new:
            if key in old:
                values()[key] = old[key]
            else:
                del values()[key]
