"""webdataset shards: tar files in which the files of one sample share a key (`000012.png`, `000012.txt`, `000012.json`).

Reading is by random access: the tar headers are scanned once, then any sample is one `pread` per file. The order in which
samples are visited is thereby a pure function of seed and position, which is what makes a resumed run exact.
"""

import bisect
import glob
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clips_core.errors import InputError
from clips_core.folders import replacing

BLOCK = 512  # bytes: a tar is made of blocks, and ends in two of zeros

ReadAt = Callable[[int, int], bytes]  # offset, length → at most so many bytes of a file


class TarIndex(NamedTuple):
    """Where the files of a tar's samples lie: arrays, since a shard may hold 10,000 samples and a loader has many open.

    The files of sample i are the entries `first[i]` … `first[i + 1]` of `extension` (a number in `extensions`), `offset`
    and `size` (bytes).
    """

    keys: list[str]
    first: np.ndarray  # int64 [samples + 1]
    extension: np.ndarray  # int16 [files]
    offset: np.ndarray  # int64 [files]
    size: np.ndarray  # int64 [files]
    extensions: list[str]
    fault: tuple[str, str] | None  # ("not a tar" | "cut-off tar" | "damaged tar", detail): what ended the tar early


class Tar:
    """The samples of one tar, by index, in its order.

    Args:
        path: a file on this machine.
        name: what the samples call their shard.

    Attributes:
        fault: what ended the tar before its end, or None; the samples that are surely whole can be read.
    """

    def __init__(self, path: Path | str, name: str):
        self.path, self.name = path, name
        self._file = os.open(path, os.O_RDONLY)
        self._index = scan_tar(
            lambda offset, length: os.pread(self._file, length, offset), os.fstat(self._file).st_size
        )
        self.keys, self.fault = self._index.keys, self._index.fault

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The files of a sample as bytes by extension, and `__key__`, `__shard__` (both str)."""
        sample: dict[str, Any] = {"__key__": self.keys[index], "__shard__": self.name}
        _, first, extension, offset, size, extensions, _ = self._index
        for i in range(first[index], first[index + 1]):
            sample[extensions[extension[i]]] = os.pread(self._file, int(size[i]), int(offset[i]))
        return sample

    def __reduce__(self) -> tuple[type, tuple[Path | str, str]]:  # a data loader's worker opens its own
        return Tar, (self.path, self.name)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()


class Shards:
    """All samples of some shards, by index: for sets that are read whole, to the last sample.

    Args:
        pattern: a folder (all its *.tar), a glob pattern, or one .tar file.

    Raises:
        InputError: if nothing matches, a file is not a tar or is cut off, or two samples share a key in one shard.
    """

    def __init__(self, pattern: Path | str):
        self.paths = find_shards(pattern)
        self._tars = [Tar(path, str(path)) for path in self.paths]
        for tar in self._tars:
            if tar.fault:
                cause = {"cut-off tar": "cut off", "damaged tar": "damaged"}.get(tar.fault[0], tar.fault[0])
                raise InputError(f"{tar.name}: {cause} ({tar.fault[1]}); fetch or build this shard again")
            if len(set(tar.keys)) < len(tar):
                twice = next(key for i, key in enumerate(tar.keys) if key in tar.keys[:i])
                raise InputError(f"{tar.name}: key {twice!r} occurs twice")
        self._ends = list(itertools.accumulate(len(tar) for tar in self._tars))
        if not self._ends[-1]:
            raise InputError(f"{pattern}: the shards hold no sample")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The files of a sample as bytes by extension, and `__key__`, `__shard__` (both str)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._ends, index)
        return self._tars[shard][index - (self._ends[shard - 1] if shard else 0)]


def find_shards(pattern: Path | str) -> list[Path]:
    """The tar files that a folder, a glob pattern or a path stands for, sorted."""
    path = Path(pattern)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise InputError(f"{path}: no *.tar shard in this folder")
        return found
    found = sorted(Path(name) for name in glob.glob(str(pattern)))
    if not found:
        raise InputError(f"{pattern}: no such folder, and no shard matches")
    return found


def write_shards(samples: Iterable[dict[str, Any]], folder: Path | str, per_shard: int = 1000) -> list[Path]:
    """Write samples as `shard-000000.tar`, …; the same samples give the same bytes.

    Args:
        samples: dicts with `__key__` and, by extension, bytes, str or JSON-able values.
        folder: made if missing. A shard appears under its name only once it is whole.
        per_shard: samples per shard.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    pending: list[dict[str, Any]] = []

    def flush() -> None:
        if pending:
            paths.append(write_shard(pending, folder / f"shard-{len(paths):06d}.tar"))
            pending.clear()

    for sample in samples:
        pending.append(sample)
        if len(pending) == per_shard:
            flush()
    flush()
    return paths


def write_shard(samples: list[dict[str, Any]], path: Path) -> Path:
    """Write one tar (see `write_shards`); it appears under its name only once it is whole."""
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            add_sample(tar, sample)
    return path


def add_sample(tar: tarfile.TarFile, sample: dict[str, Any]) -> None:
    """Add the files of a sample (see `write_shards`) to an open tar; `__key__` and the like are none."""
    for extension, value in sample.items():
        if not extension.startswith("__"):
            data = _encode(value)
            info = tarfile.TarInfo(f"{sample['__key__']}.{extension}")  # owner 0, mtime 0: no trace of when or who
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _encode(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


# --- tar headers ----------------------------------------------------------------------------------------------------


def scan_tar(read_at: ReadAt, size: int) -> TarIndex:
    """Find the samples of a tar: files whose names are equal up to the first dot, wherever in the tar they stand.

    A file whose extension its sample has already begins another sample of the same key. Of a tar that is cut off or damaged
    the samples before that place are kept, but for the last one: files of it may be missing.

    Args:
        read_at: reads the tar.
        size: of the tar, in bytes.
    """
    keys: list[str] = []
    numbers: dict[str, int] = {}  # sample by key
    extensions: dict[str, int] = {}
    files: list[tuple[int, int, int, int]] = []  # sample, extension, offset, size
    seen: set[tuple[int, int]] = set()  # sample, extension
    last, fault = -1, None
    try:
        for name, offset, length in _tar_files(read_at, size):
            split = split_name(name)
            if split is None:
                continue
            key, extension = split[0], extensions.setdefault(split[1], len(extensions))
            last = numbers.get(key, -1)
            if last < 0 or (last, extension) in seen:
                last = numbers[key] = len(keys)
                keys.append(key)
            seen.add((last, extension))
            files.append((last, extension, offset, length))
    except _Fault as error:
        fault = (error.cause, error.detail)
    if fault and keys:
        numbers_kept = np.delete(np.arange(len(keys)), last)
        keys.pop(last)
        fault = (fault[0], f"{fault[1]}; whole up to {keys[-1] if keys else 'its start'!r}")
        renumbered = {int(old): new for new, old in enumerate(numbers_kept)}
        files = [(renumbered[file[0]], *file[1:]) for file in files if file[0] != last]
    table = np.array(files, dtype=np.int64).reshape(-1, 4)
    table = table[np.argsort(table[:, 0], kind="stable")]  # a sample's files side by side
    first = np.searchsorted(table[:, 0], np.arange(len(keys) + 1))
    return TarIndex(
        keys, first, table[:, 1].astype(np.int16), table[:, 2].copy(), table[:, 3].copy(), list(extensions), fault
    )


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a file in a shard, or None if it has not both; `a/b.seg.png` → ("a/b", "seg.png")."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


class _Fault(Exception):
    def __init__(self, cause: str, detail: str):
        super().__init__(detail)
        self.cause, self.detail = cause, detail


def _tar_files(read_at: ReadAt, size: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every regular file in a tar of the ustar, GNU or pax kind.

    `tarfile` says the same and takes five times as long, which a loader's workers would wait for at every new shard.

    Raises:
        _Fault: behind the last whole file, where the tar ends too early or is damaged; "not a tar" at its start.
    """
    offset, name, length = 0, "", -1  # name and length: what an extended header says of the next file
    while True:
        header = read_at(offset, BLOCK)
        if len(header) < BLOCK:
            raise _Fault("not a tar" if offset == 0 else "cut-off tar", f"{size} bytes, and no end of the archive")
        if header == _ZEROS:
            return
        try:
            stored = int(header[148:156].rstrip(b" \0") or b"0", 8)
            count = _number(header[124:136])
        except ValueError:
            stored, count = -1, -1
        if stored != sum(header) - sum(header[148:156]) + 8 * 32 or count < 0:  # its own field counts as spaces
            cause = "not a tar" if offset == 0 else "damaged tar"
            raise _Fault(cause, "no tar header at its start" if offset == 0 else f"no header at byte {offset}")
        kind, start = header[156:157], offset + BLOCK
        if kind in b"LxKg":  # of extended headers, those of the next file: GNU's long name, pax records
            if count > 2**20:
                raise _Fault("damaged tar", f"a header of {count} bytes at byte {offset}")
            extended = read_at(start, count)
            if kind == b"L":
                name = _text(extended)
            elif kind == b"x":
                records = _pax_records(extended)
                name = records.get("path", name)
                length = int(records["size"]) if records.get("size", "").isdigit() else length
        else:
            count = length if length >= 0 else count
            if kind in b"0\0" + b"7":
                if not name:
                    folder = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
                    name = f"{folder}/{_text(header[:100])}" if folder else _text(header[:100])
                if start + count > size:
                    raise _Fault("cut-off tar", f"inside {name!r}")
                yield name, start, count
            name, length = "", -1
        offset = start + -(-count // BLOCK) * BLOCK


_ZEROS = bytes(BLOCK)


def _number(field: bytes) -> int:
    """A size as octal digits, or in binary beyond 8 GiB."""
    return int.from_bytes(field[1:]) if field[0] == 0x80 else int(field.rstrip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", errors="surrogateescape")


def _pax_records(data: bytes) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n` records."""
    records, position = dict[str, str](), 0
    while position < len(data):
        digits = data[position : position + 20].partition(b" ")[0]
        if not digits.isdigit() or int(digits) <= len(digits):
            break
        key, _, value = data[position + len(digits) + 1 : position + int(digits) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        position += int(digits)
    return records
