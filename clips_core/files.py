"""Files by path or url: on this machine, or remote through fsspec (`s3://`, `gs://`, `https://`, …)."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from tqdm import tqdm

from clips_core.errors import InputError

THREADS = 16  # of requests to remote storage, which mostly wait
ATTEMPTS = 6  # at a remote file; with the waits between them, half a minute
FIRST_WAIT = 1.0  # seconds; doubles with every further attempt
# Packages that fsspec imports for a protocol.
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
            "abfs": "adlfs", "az": "adlfs", "hf": "huggingface_hub", "oss": "ossfs", "ssh": "paramiko"}  # fmt: skip

In = TypeVar("In")
Out = TypeVar("Out")


class File(NamedTuple):
    """A file as a listing shows it: enough to notice that it is another one now."""

    path: str  # or url
    size: int  # bytes
    modified: str  # time or tag, whatever the storage gives; "" for nothing


def is_remote(path: str) -> bool:
    return "://" in path


def find_files(pattern: str, suffixes: Sequence[str]) -> list[File]:
    """The files that a pattern stands for, sorted within each of its alternatives.

    Args:
        pattern: a file, a folder (its files of the first of the `suffixes` that occurs there), a glob pattern, each also
            as a url, or several of them as a brace pattern: `shards/{00000..01023}.tar`, `{a,b}/*.parquet`.
        suffixes: `.tar`, say.

    Raises:
        InputError: if one of the alternatives stands for no file.
    """
    if not is_remote(pattern) and os.path.exists(pattern):
        return _find_local(pattern, suffixes)  # braces and brackets in its name mean themselves
    find = _find_remote if is_remote(pattern) else _find_local
    found = in_threads(lambda alternative: find(alternative, suffixes), expand_braces(pattern), "looking for files")
    return [file for files in found for file in files]


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}` → a0, a1, a2; `a{08..10}` → a08, a09, a10; `{x,y}z` → xz, yz.

    Raises:
        InputError: if the braces hold something else.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        if first > last:
            raise InputError(f"{pattern}: {match[0]} counts downwards; write the smaller number first")
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        middles = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in match[1]:
        middles = match[1].split(",")
    else:
        raise InputError(f"{pattern}: {match[0]} is neither a range like {{00000..01023}} nor a choice like {{a,b}}")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for middle in middles for path in expand_braces(head + middle + tail)]


def open_file(path: str, mode: str = "rb") -> IO[bytes]:
    """A local or remote file, to read or write bytes. Reading a remote one may seek; it buffers some megabytes ahead."""
    if not is_remote(path):
        return open(path, mode)
    filesystem, inner = _filesystem(path)
    return filesystem.open(inner, mode)


def read_bytes(path: str) -> bytes:
    """All bytes of a file; several attempts at a remote one.

    Raises:
        FileNotFoundError: if it does not exist.
        InputError: if a remote file cannot be read, naming its url.
    """
    if not is_remote(path):
        return Path(path).read_bytes()

    def read() -> bytes:
        filesystem, inner = _filesystem(path)
        return bytes(filesystem.cat_file(inner))

    return retried(path, read)


def copy(path: str, target: Path) -> None:
    """Copy a remote file whole to this machine, in several attempts.

    Raises:
        InputError: naming the url, if it does not exist or the last attempt fails.
    """

    def fetch() -> None:
        with open_file(path) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 2**22)

    try:
        retried(path, fetch)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None


def retried(path: str, action: Callable[[], Out]) -> Out:
    """What `action` returns, at the latest at the last attempt.

    Raises:
        FileNotFoundError: at once; waiting would not help.
        InputError: naming the path and the last error.
    """
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except (FileNotFoundError, InputError):
            raise
        except Exception as error:  # each storage has errors of its own, few of them OSErrors
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            if attempt == ATTEMPTS or isinstance(error, PermissionError):
                raise InputError(
                    f"{path}: cannot be read, in {attempt} attempts ({type(error).__name__}: {error})"
                ) from None
        time.sleep(wait)
        wait *= 2
    raise AssertionError("unreachable")


def in_threads(function: Callable[[In], Out], items: Iterable[In], name: str) -> Iterator[Out]:
    """`map` over threads, in order, with a progress bar once it takes longer than a moment."""
    items = list(items)
    pool = ThreadPoolExecutor(max(1, min(THREADS, len(items))))
    try:
        yield from tqdm(pool.map(function, items), desc=name, total=len(items), unit="file", delay=1)
    finally:
        pool.shutdown(cancel_futures=True)


def _find_local(pattern: str, suffixes: Sequence[str]) -> list[File]:
    if os.path.isdir(pattern):
        names = sorted(name for name in os.listdir(pattern) if not name.startswith("."))
        paths = _of_one_kind([os.path.join(pattern, name) for name in names], suffixes)
        if not paths:
            raise InputError(f"{pattern}: no {' or '.join('*' + suffix for suffix in suffixes)} in this folder")
    else:
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise InputError(f"{pattern}: no such folder, and no file matches")
    # A network's file system answers slowly, but many questions at a time; a few are not worth the threads.
    stats = in_threads(os.stat, paths, "looking at files") if len(paths) > THREADS else map(os.stat, paths)
    return [File(path, stat.st_size, str(stat.st_mtime_ns)) for path, stat in zip(paths, stats, strict=True)]


def _find_remote(pattern: str, suffixes: Sequence[str]) -> list[File]:
    filesystem, inner = _filesystem(pattern)

    def look() -> dict[str, Any]:
        if glob.has_magic(inner):
            return dict(filesystem.glob(inner, detail=True))
        info = filesystem.info(inner)
        if info["type"] != "directory":
            return {inner: info}
        infos = {str(info["name"]): info for info in filesystem.ls(inner, detail=True)}
        return {path: infos[path] for path in _of_one_kind(sorted(infos), suffixes)}

    with contextlib.suppress(FileNotFoundError):
        infos = {path: info for path, info in retried(pattern, look).items() if info["type"] != "directory"}
        if infos:
            return [_remote_file(filesystem, path, info) for path, info in sorted(infos.items())]
    raise InputError(f"{pattern}: no such remote file or folder, or none with {' or '.join(suffixes)} in it")


def _remote_file(filesystem: Any, path: str, info: dict[str, Any]) -> File:
    tags = (info.get(key) for key in ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "created"))
    modified = next((str(tag) for tag in tags if tag), "")
    return File(str(filesystem.unstrip_protocol(path)), int(info.get("size") or 0), modified)


def _of_one_kind(paths: list[str], suffixes: Sequence[str]) -> list[str]:
    kinds = ([path for path in paths if path.endswith(suffix)] for suffix in suffixes)
    return next((kind for kind in kinds if kind), [])


def _filesystem(path: str) -> tuple[Any, str]:
    """The storage of a url, and the path in it. Made anew in each process: its connections do not survive a fork."""
    from fsspec.core import url_to_fs

    protocol = path.partition("://")[0]
    try:
        filesystem, inner = url_to_fs(path)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        advice = f"pip install {package}" if package else f"install what fsspec asks for ({error})"
        raise InputError(f"{path}: reading {protocol}:// needs a package that is not installed: {advice}") from None
    except ValueError as error:
        raise InputError(f"{path}: {protocol}:// is no storage that fsspec knows ({error})") from None
    return filesystem, str(inner)


# --- copies on this machine -----------------------------------------------------------------------------------------


class LocalCopies:
    """A folder of files that the loader's processes of a run share, and that goes when the run does.

    A run that is killed cannot tidy up; the next one on this machine does.

    Args:
        parent: folder for the folder; None: the system's temporary folder.
    """

    def __init__(self, parent: Path | None):
        parent = parent or Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        self.folder = parent / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        # Held for life, by this process and the workers that it forks: the sign that the folder is in use.
        self._in_use: IO[bytes] | None = open(f"{self.folder}.lock", "wb")  # noqa: SIM115
        fcntl.flock(self._in_use, fcntl.LOCK_EX)
        self.folder.mkdir(mode=0o700)
        weakref.finalize(self, _remove_copies, self.folder, os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_in_use": None}

    @contextlib.contextmanager
    def file(self, name: str, make: Callable[[Path], None]) -> Iterator[Path]:
        """Within, the copy called `name` is there, made by `make` unless another process has; open it and it stays readable.

        Raises:
            InputError: if the disk is full.
        """
        path = self.folder / hashlib.sha256(name.encode()).hexdigest()[:32]
        temporary = path.with_suffix(".tmp")
        with self._locked(path):
            if not path.exists():
                try:
                    make(temporary)
                    os.replace(temporary, path)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    raise InputError(
                        f"{self.folder}: the disk is full; set data.cache to a folder with more space, or "
                        "data.shuffle_chunks to fewer chunks"
                    ) from None
                finally:
                    temporary.unlink(missing_ok=True)
            yield path

    def drop(self, name: str) -> None:
        """Remove a copy; whoever has it open can go on reading."""
        path = self.folder / hashlib.sha256(name.encode()).hexdigest()[:32]
        with contextlib.suppress(FileNotFoundError), self._locked(path):
            path.unlink()

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with open(path.with_name(f"lock-{path.name[:2]}"), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


_PREFIX = "clips-llava-data-"


def _remove_copies(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
        Path(f"{folder}.lock").unlink(missing_ok=True)


def _remove_abandoned(parent: Path) -> None:
    for lock in parent.glob(f"{_PREFIX}*.lock"):
        with contextlib.suppress(OSError), open(lock, "r+b") as file:  # OSError: in use, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
