"""Benchmark files on this machine: found and checked before the first question, then read by lmms-eval's own tasks.

A data folder mirrors the hub: `FOLDER/lmms-lab-encoder/POPE/…parquet`. A task asks for `lmms-lab-encoder/POPE`, and
`datasets` takes that for a path when such a folder stands in the working directory.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from clips_core.config import FORBID
from clips_core.errors import InputError
from clips_core.folders import sha256_file
from clips_core.images import open_image

Kind = Literal["string", "int64", "strings", "image"]


@dataclass(config=FORBID)
class Table:
    """One split of a data set that a task reads."""

    repository: str
    """The name that the task loads: a folder in the data folder."""
    split: str
    columns: dict[str, Kind]
    """What the task reads, and of which kind."""
    configuration: str | None = None
    """None: the repository's default one."""
    covers: dict[str, str] = field(default_factory=dict)
    """A column here → a column of the task's first table, all of whose values must be found here."""


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class Found:
    """A table and the parquet files that hold it, as `datasets` resolves them."""

    table: Table
    files: tuple[Path, ...]
    features: Any
    """`datasets.Features`, or None where only the parquet files say it."""

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


def fingerprint(folder: Path, tables: list[Found]) -> str:
    """Hex SHA-256 over the names and contents of all files that the tables are read from."""
    files = {file for found in tables for file in found.files}
    files |= {folder / found.table.repository / "README.md" for found in tables}  # says which file is which split
    listing = {os.path.relpath(file, folder): sha256_file(file) for file in sorted(files) if file.is_file()}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def check(tables: list[Found]) -> None:
    """Every file readable, every column there and of its kind, every picture whole; the first table has the questions.

    Raises:
        InputError: naming file and column, for a picture also the row.
    """
    import pyarrow.parquet as pq

    for found in tables:
        for file in found.files:
            _check_columns(file, found)
        if sum(pq.read_metadata(file).num_rows for file in found.files) == 0:
            raise InputError(f"{found.files[0]}: has no rows")
        for column in (name for name, kind in found.table.columns.items() if kind == "image"):
            _check_pictures(found, column)
        for column, asked in found.table.covers.items():
            missing = sorted(set(tables[0].values(asked)) - set(found.values(column)))
            if missing:
                shown = ", ".join(map(repr, missing[:3]))
                raise InputError(
                    f"{found.files[0]}, column {column!r}: lacks {len(missing)} of the values in column {asked!r} of"
                    f" {tables[0].files[0]}, for example {shown}"
                )


def _check_columns(file: Path, found: Found) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}: not a readable parquet file ({' '.join(str(error).split())})") from None
    features = found.features or datasets.Features.from_arrow_schema(schema)
    for column, kind in found.table.columns.items():
        if column not in schema.names:
            raise InputError(f"{file}: no column {column!r} (it has: {', '.join(schema.names)})")
        if not _is_of(kind, features.get(column)):
            raise InputError(f"{file}, column {column!r}: is {features.get(column)}, but {kind!r} is needed")


def _is_of(kind: Kind, feature: Any) -> bool:
    import datasets

    if kind == "image":
        return isinstance(feature, datasets.Image)
    if kind == "strings":
        return _is_of("string", getattr(feature, "feature", None))
    dtype = getattr(feature, "dtype", "")
    return dtype in ("string", "large_string") if kind == "string" else dtype in ("int64", "int32")


def _check_pictures(found: Found, column: str) -> None:
    """Decode each different picture once: a damaged one must not come to light in the middle of a run."""
    import pyarrow.parquet as pq

    seen = set()
    for file in found.files:
        row = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=64, columns=[column]):
            for value in batch.column(0).to_pylist():
                name = f"{file}, row {row}, column {column!r}"
                data = value and value["bytes"]
                if not data:
                    raise InputError(f"{name}: holds no picture (its bytes must be in the file)")
                digest = hashlib.sha256(data).digest()
                if digest not in seen:
                    open_image(data, name)
                    seen.add(digest)
                row += 1


@contextlib.contextmanager
def working_from(folder: Path, cache: Path) -> Iterator[None]:
    """Inside, lmms-eval's tasks load from `folder`, no network is asked, and `datasets` caches under `cache` alone.

    The cache matters: `datasets` knows a local file by its path and time of change, so with a shared one an exchanged
    file could be answered with the rows of the old one. Everything is put back on the way out.
    """
    import datasets.config
    import huggingface_hub.constants
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    cache.mkdir(parents=True, exist_ok=True)
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LMMS_EVAL_DATASETS_CACHE": str(cache)}
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
