"""webdataset shards: tar files in which the files of one sample share a key (`000012.png`, `000012.txt`, `000012.json`).

Reading is by random access: the tar headers are scanned once, then any sample is one `pread` per file. The order in which
samples are visited is thereby a pure function of seed and epoch, which is what makes a resumed run exact.
"""

import glob
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from clips_core.errors import InputError


class Member(NamedTuple):
    """One file of one sample: where its bytes lie."""

    extension: str
    offset: int
    size: int


class Entry(NamedTuple):
    """One sample: the number of its shard, its key, its files."""

    shard: int
    key: str
    members: tuple[Member, ...]


class Shards:
    """All samples of some shards, by index.

    Args:
        pattern: a folder (all its *.tar), a glob pattern, or one .tar file.

    Raises:
        InputError: if nothing matches, a file is not a tar or is cut off, or two samples share a key in one shard.
    """

    def __init__(self, pattern: Path | str):
        self.paths = find_shards(pattern)
        self.entries = [entry for shard, path in enumerate(self.paths) for entry in _scan(shard, path)]
        if not self.entries:
            raise InputError(f"{pattern}: the shards hold no sample")
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The files of a sample as bytes by extension, and `__key__`, `__shard__` (both str)."""
        entry = self.entries[index]
        if entry.shard not in self._files:
            self._files[entry.shard] = os.open(self.paths[entry.shard], os.O_RDONLY)
        file = self._files[entry.shard]
        sample: dict[str, Any] = {"__key__": entry.key, "__shard__": str(self.paths[entry.shard])}
        for member in entry.members:
            sample[member.extension] = os.pread(file, member.size, member.offset)
        return sample

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def __getstate__(self) -> dict[str, Any]:  # a data loader's worker opens its own files
        return {**self.__dict__, "_files": {}}


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for extension, value in sample.items():
                if extension == "__key__":
                    continue
                data = _encode(value)
                info = tarfile.TarInfo(f"{sample['__key__']}.{extension}")  # owner 0, mtime 0: no trace of when or who
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    os.replace(temporary, path)
    return path


def _encode(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def _scan(shard: int, path: Path) -> list[Entry]:
    """The samples of one tar, in its order. Files of one key are grouped as webdataset does: up to the name's first dot."""
    size = path.stat().st_size
    samples: dict[str, list[Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not stem or not extension:
                    continue
                if info.offset_data + info.size > size:
                    raise InputError(f"{path}: cut off inside {info.name!r}; fetch or build this shard again")
                key = f"{folder}/{stem}" if folder else stem
                samples.setdefault(key, []).append(Member(extension.lower(), info.offset_data, info.size))
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: not a tar file, or damaged ({error})") from None
    for key, members in samples.items():
        names = [member.extension for member in members]
        if len(set(names)) < len(names):
            raise InputError(f"{path}: key {key!r} occurs twice")
    return [Entry(shard, key, tuple(members)) for key, members in samples.items()]
