"""What a training run reads: webdataset tars, parquet files with the pictures' bytes, listings beside a folder of pictures.

They are read in *chunks*: a tar, a row group of a parquet file, 1,000 rows of a listing. To place samples in a run, only the number
of samples in each chunk must be known; a chunk's own index is made where it is opened. Every kind gives the same samples:
a dict of `__key__`, `__shard__` (str) and, by extension or column, bytes, str, or what JSON has.
"""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from clips_core import listings
from clips_core.config import DataConfig, SourceConfig
from clips_core.errors import BadSample, InputError
from clips_core.files import File, LocalCopies, copy, find_files, in_threads, is_remote, open_file, read_bytes, retried
from clips_core.folders import MANIFEST, MetricsLog, read_json
from clips_core.shards import Tar, scan_tar

KINDS = (".tar", ".parquet", ".jsonl", ".csv")
LISTING_CHUNK = 1000  # rows
FEW_FILES = 100  # on this machine: counted in a moment, so not worth remembering
KEYS = ("__key__", "key", "id")  # columns that name a row of a parquet file


class Skipped(NamedTuple):
    """A sample, or with the key "" a whole file, that is left out, and why."""

    shard: str
    key: str
    cause: str  # a few words that many have in common, see `BadSample.cause`
    detail: str


class Reader(Protocol):
    """The samples of an open chunk."""

    fault: tuple[str, str] | None  # cause and detail, where the chunk ends before its end

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Source(NamedTuple):
    """The files of one source, and its chunks."""

    files: list[File]
    file: np.ndarray  # int64 [chunks]: number of each chunk's file
    part: np.ndarray  # int64 [chunks]: which of the file: number of a row group, byte offset of a slice of a listing, 0
    counts: np.ndarray  # int64 [chunks]: samples, at least 1
    weight: float


class Sources:
    """Everything that `config.train` names.

    Args:
        config: `train`, the names of pictures and captions, `max_bad_share`, `cache`.
        index: a file that keeps the numbers of samples, so that they are counted once; None: count every time. Of several
            processes let one come first.

    Attributes:
        faults: the files that are cut off, damaged, or not what their name says.

    Raises:
        InputError: if a file is missing or of no known kind, has no column for the picture or the web caption, or if more than
            `max_bad_share` of the files cannot be read at all.
    """

    def __init__(self, config: DataConfig, index: Path | None = None):
        self.config = config
        found = [_files(source) for source in config.train]
        entries = _index([file for files in found for file in files], index)
        self.sources = [
            _source(files, entries, source.weight) for files, source in zip(found, config.train, strict=True)
        ]
        self.faults = [
            Skipped(path, "", *entry["fault"]) for path, entry in entries.items() if entry["fault"] is not None
        ]
        unreadable = [path for path, entry in entries.items() if entry["fault"] is not None and not entry["parts"]]
        if len(unreadable) > config.max_bad_share * len(entries):
            first = next(fault for fault in self.faults if fault.shard == unreadable[0])
            raise InputError(
                f"{first.shard}: {first.cause} ({first.detail}); {len(unreadable)} of {len(entries)} files are bad, more than "
                f"data.max_bad_share={config.max_bad_share} allows"
            )
        for source, source_config in zip(self.sources, config.train, strict=True):
            if not len(source.counts):
                raise InputError(f"{', '.join(source_config.path)}: the shards hold no sample")
        self._check_columns(entries)
        # The columns of a table that are read.
        self._names = {*config.image, *KEYS, *_columns(config.web_caption), *_columns(config.synthetic_caption)}
        self._copies: LocalCopies | None = None
        if any(
            is_remote(file.path) or file.path.endswith(".parquet") for source in self.sources for file in source.files
        ):
            self._copies = LocalCopies(config.cache)

    def __len__(self) -> int:
        """Samples in all."""
        return sum(int(source.counts.sum()) for source in self.sources)

    def fingerprint(self) -> str:
        """Number of samples, of shards and of bytes: enough to notice other data, without reading terabytes."""
        files = [file for source in self.sources for file in source.files]
        return f"{len(self)} samples, {len(files)} shards, {sum(file.size for file in files)} bytes"

    def captioners(self) -> list[str]:
        """Who wrote the synthetic captions, as the manifests with the files say: `unknown` of files without one."""
        files = [file.path for source in self.sources for file in source.files]
        folders = dict.fromkeys(None if is_remote(path) else Path(path).parent for path in files)
        return list(dict.fromkeys(_captioner(folder) for folder in folders))

    def open(self, source: int, chunk: int) -> Reader:
        """The samples of a chunk. Close it when it is not needed any more, and `drop` it.

        Raises:
            InputError: if the file is gone, or does not hold as many samples as were counted.
        """
        path, part, count = self.path(source, chunk), self._part(source, chunk), int(self.sources[source].counts[chunk])
        reader: Reader
        try:
            if path.endswith((".jsonl", ".csv")):
                reader = ListingRows(path, part, count)
            else:
                with self._local(source, chunk) as local:
                    reader = Tar(local, path) if path.endswith(".tar") else Rows(local, path, part)
        except FileNotFoundError:
            raise InputError(f"{path}: is gone; it was there when the run started") from None
        except _Damaged as error:
            reader = Nothing(("damaged parquet", f"row group {part}: {error}"))
        if len(reader) != count and reader.fault is None:
            reader.close()
            raise InputError(
                f"{path}: holds {len(reader)} samples, but {count} were counted: the file has changed, or the successes in "
                "the _stats.json beside it are wrong. Correct or delete that, and delete data_index.jsonl in the run's folder"
            )
        return reader

    def fetch_ahead(self, source: int, chunks: Sequence[int], is_wanted: Callable[[int], bool]) -> None:
        """Make the local copies of chunks that are needed next, in a thread of its own, as long as they are wanted."""
        if self._copies is None:
            return

        def fetch() -> None:
            for chunk in chunks:
                if is_wanted(chunk):
                    with contextlib.suppress(Exception), self._local(source, chunk):  # `open` will say what is wrong
                        pass
                    if not is_wanted(chunk):  # the reading has overtaken the copying, and has dropped it already
                        self.drop(source, chunk)

        threading.Thread(target=fetch, daemon=True).start()

    def drop(self, source: int, chunk: int) -> None:
        """Remove the local copy of a chunk, if there is one; whoever has it open can go on reading."""
        if self._copies is not None:
            self._copies.drop(f"{self.path(source, chunk)}#{self._part(source, chunk)}")

    def _local(self, source: int, chunk: int) -> contextlib.AbstractContextManager[Path]:
        """A file on this machine with what the chunk holds: a tar, or an unpacked row group."""
        path, part = self.path(source, chunk), self._part(source, chunk)
        make: Callable[[Path], None]
        if path.endswith(".parquet"):
            make = partial(_unpack, path, part, self._names)
        elif is_remote(path) and path.endswith(".tar"):
            make = partial(copy, path)
        else:
            return contextlib.nullcontext(Path(path))
        assert self._copies is not None
        return self._copies.file(f"{path}#{part}", make)

    def _part(self, source: int, chunk: int) -> int:
        return int(self.sources[source].part[chunk])

    def path(self, source: int, chunk: int) -> str:
        """The file that a chunk is in."""
        files, file, *_ = self.sources[source]
        return files[file[chunk]].path

    def _check_columns(self, entries: dict[str, dict[str, Any]]) -> None:
        """A column that all of a table's rows lack is not a bad sample but a wrong setting."""
        wanted = {"image": set(self.config.image), "web_caption": _columns(self.config.web_caption)}
        for path, entry in entries.items():
            if not entry["columns"]:
                continue
            for setting, names in wanted.items():
                if not names & set(entry["columns"]):
                    raise InputError(
                        f"{path}: has no column {' or '.join(sorted(names))}; its columns are {', '.join(entry['columns'])}. "
                        f"Set data.{setting}"
                    )


class Rows:
    """A row group, unpacked into an Arrow file that is mapped into memory: it costs disk space, shared by all processes."""

    fault: tuple[str, str] | None = None

    def __init__(self, path: Path, name: str, number: int):
        import pyarrow as pa

        self.name, self.number = name, number
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = f"row {index} of row group {self.number}"
        try:
            values = self._table.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            message = f"{self.name}, key {where!r}: a text is not UTF-8 ({error})"
            raise BadSample("caption is not UTF-8", message) from None
        key = next((str(values[name]) for name in KEYS if values.get(name) is not None), where)
        sample = {name: _bytes(value) for name, value in values.items()} | {"__key__": key, "__shard__": self.name}
        return {name: value for name, value in sample.items() if value is not None}

    def close(self) -> None:
        self._table = None


class ListingRows:
    """Some rows of a listing. The key of a sample is its picture's path."""

    fault: tuple[str, str] | None = None

    def __init__(self, path: str, offset: int, count: int):
        self.name, self._folder = path, path.rpartition("/")[0]
        with open_file(path) as file:
            self._rows = retried(path, lambda: listings.read_slice(path, file, offset, count))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        try:
            values = json.loads(row) if isinstance(row, str) else row
        except json.JSONDecodeError as error:
            raise BadSample("not JSON", f"{self.name}, key {row[:40]!r}: not JSON ({error.msg})") from None
        image = values.get("image") if isinstance(values, dict) else None
        where = f"{self.name}, key {image!r}"
        if not isinstance(image, str) or not image:
            raise BadSample("no picture", f"{where}: no image")
        if not listings.is_inside(image):
            raise BadSample("no picture", f"{where}: must be relative to the listing's folder, and inside it")
        try:
            data = read_bytes(f"{self._folder}/{image}" if self._folder else image)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise BadSample("no picture", f"{where}: cannot be read ({error})") from None
        values = {name: value for name, value in values.items() if name is not None and value is not None}
        return {**values, "image": data, "__key__": image, "__shard__": self.name}

    def close(self) -> None:
        self._rows = []


class Nothing:
    """A chunk that cannot be read at all."""

    def __init__(self, fault: tuple[str, str]):
        self.fault: tuple[str, str] | None = fault

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise IndexError(index)

    def close(self) -> None:
        pass


# --- what there is --------------------------------------------------------------------------------------------------


def _files(source: SourceConfig) -> list[File]:
    files = [file for pattern in source.path for file in find_files(pattern, KINDS)]
    for file in files:
        if not file.path.endswith(KINDS):
            raise InputError(
                f"{file.path}: is of no known kind; data.train takes {', '.join('*' + kind for kind in KINDS)}"
            )
    path, times = Counter(file.path for file in files).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path}: is named {times} times by {', '.join(source.path)}")
    return files


def _source(files: list[File], entries: dict[str, dict[str, Any]], weight: float) -> Source:
    parts = [(i, *part) for i, file in enumerate(files) for part in entries[file.path]["parts"]]
    table = np.array(parts, dtype=np.int64).reshape(-1, 3)
    return Source(files, table[:, 0], table[:, 1], table[:, 2], weight)


def _columns(names: Sequence[str]) -> set[str]:
    """The columns that hold captions: `json.re_caption` is a field of `json`, or a column of that name."""
    return {*names, *(name.partition(".")[0] for name in names)}


def _index(files: list[File], cache: Path | None) -> dict[str, dict[str, Any]]:
    """What is known of each file, by path: its chunks as (part, samples), its columns, its fault.

    What was counted before is taken from `cache`, as long as size and time of the file are the same.
    """
    known: dict[str, dict[str, Any]] = {}
    log = None
    if cache is not None and (len(files) > FEW_FILES or any(is_remote(file.path) for file in files)):
        log = MetricsLog(cache)
        known = {row["path"]: row for row in log.rows()}
    fresh = [
        file
        for file in files
        if file.path not in known
        or (known[file.path]["size"], known[file.path]["modified"]) != (file.size, file.modified)
    ]
    if log is not None and fresh:
        log.cut_after(0)  # rows have no step: this drops only a last line that a kill cut off
    for row in in_threads(_count, fresh, "counting samples"):
        known[row["path"]] = row
        if log is not None:
            log.log(**row)
    return {file.path: known[file.path] for file in files}


def _count(file: File) -> dict[str, Any]:
    path, fault = file.path, None
    parts: list[tuple[int, int]] = []
    columns: list[str] = []
    if path.endswith(".tar"):
        count = _successes(path)
        if count is None:
            count, fault = _count_tar(file)
        parts = [(0, count)]
    elif path.endswith(".parquet"):
        parts, columns, fault = _count_rows(path)
    else:
        with open_file(path) as opened:
            parts, columns = retried(path, lambda: listings.slices(path, opened, LISTING_CHUNK))
    return {**file._asdict(), "parts": [part for part in parts if part[1]], "columns": columns, "fault": fault}


def _successes(path: str) -> int | None:
    """What img2dataset wrote beside a tar about how many samples it holds."""
    try:
        with open_file(f"{path.removesuffix('.tar')}_stats.json") as file:
            successes = json.loads(file.read())["successes"]
    except InputError:
        raise
    except Exception:  # there is none, or it is another program's; storages say that in many ways
        return None
    return successes if isinstance(successes, int) and successes >= 0 else None


def _count_tar(file: File) -> tuple[int, tuple[str, str] | None]:
    def count() -> tuple[int, tuple[str, str] | None]:
        with open_file(file.path) as opened:

            def read_at(offset: int, length: int) -> bytes:
                opened.seek(offset)
                return opened.read(length)

            found = scan_tar(read_at, file.size)
            return len(found.keys), found.fault

    return retried(file.path, count)


def _count_rows(path: str) -> tuple[list[tuple[int, int]], list[str], tuple[str, str] | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def count() -> tuple[list[tuple[int, int]], list[str], tuple[str, str] | None]:
        with open_file(path) as file:
            try:
                footer = pq.ParquetFile(file)
            except pa.ArrowInvalid as error:
                return [], [], ("not a parquet file", " ".join(str(error).split()))
            metadata = footer.metadata
            parts = [(i, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups)]
            return parts, list(footer.schema_arrow.names), None

    return retried(path, count)


class _Damaged(Exception):
    """A row group that cannot be read."""


def _unpack(path: str, number: int, names: set[str], target: Path) -> None:
    """Write the columns that are read of one row group of a parquet file as an Arrow file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read() -> Any:
        with open_file(path) as file:
            try:
                table = pq.ParquetFile(file)
                columns = [name for name in table.schema_arrow.names if name in names]
                # Threads of Arrow's would not survive the fork that loader processes come from.
                return table.read_row_group(number, columns, use_threads=False)
            except OSError as error:
                if error.errno is not None:  # the disk's or the storage's fault, not the file's
                    raise
                return error
            except pa.ArrowException as error:
                return error

    table = read() if not is_remote(path) else retried(path, read)
    if isinstance(table, Exception):
        raise _Damaged(" ".join(str(table).split()))
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _bytes(value: Any) -> Any:
    """A picture's bytes out of the struct {bytes, path} that Hugging Face's datasets have."""
    return value["bytes"] if isinstance(value, dict) and value.keys() == {"bytes", "path"} else value


def _captioner(folder: Path | None) -> str:
    """Of shards that `data recaption`, `data join` or `data world` wrote: there, or in a folder of theirs."""
    for place in () if folder is None else (folder, folder.parent):
        manifest = None
        with contextlib.suppress(InputError, OSError):  # none, or another program's file of that name
            manifest = read_json(place / MANIFEST)
        match manifest:
            case {"stage": "recaption", "config": {"endpoint_model": str(name)} | {"model": str(name)}}:
                return name
            case {"stage": "join", "config": {"captions": captions}}:
                return f"whoever wrote {captions}"
            case {"stage": "world"}:
                return "the sample world"
    return "unknown"
