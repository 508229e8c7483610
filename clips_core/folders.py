"""A folder explains itself: what stage made it, from which config and inputs, in what environment.

`manifest.json` is written last and atomically, so a folder counts as finished exactly when it has one.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from clips_core.config import to_dict
from clips_core.errors import InputError

MANIFEST = "manifest.json"
_PACKAGES = (
    "clips-llava", "torch", "torchvision", "open_clip_torch", "timm", "transformers", "tokenizers", "peft", "accelerate",
    "datasets", "lmms-eval", "numpy", "pillow", "deepspeed", "bitsandbytes", "liger-kernel",
)  # fmt: skip


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which appears under its name once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(folder: Path, wait: bool = False, lock: str = ".lock") -> Iterator[bool]:
    """Whether `folder` is ours within, and no other process's. The claim ends with the process, however that ends; a process that
    it started with `close_fds=False` shares the claim and, left behind, keeps it.

    Args:
        wait: for a claim of another process to end.
        lock: a file in `folder`; with a name of its own the claim is to a part of what is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / lock, os.O_RDWR | os.O_CREAT, 0o644)
    os.set_inheritable(file, True)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks: nothing keeps the processes apart
            pass
        yield True
    finally:
        os.close(file)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically; NaN and infinities are refused (they are not JSON)."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path | str) -> Any:
    """Read JSON, or raise an `InputError` that names the file and line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None


def environment() -> dict[str, Any]:
    """Versions and devices, for the record. Packages that are not installed are left out."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device_name(),
        "cores": os.cpu_count(),
        "packages": versions,
        "commit": _commit(),
    }


def write_manifest(
    folder: Path | str, stage: str, config: Any, inputs: dict[str, str], outputs: dict[str, Any]
) -> dict[str, Any]:
    """Mark `folder` as finished. `inputs` maps what was read to its hash; `outputs` holds paths and figures.

    Hashes of every `*.safetensors` file in the folder are recorded too, so that a later stage can refuse other weights.
    """
    folder = Path(folder)
    weights = {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    manifest = {
        "stage": stage,
        "config": config if isinstance(config, dict) else to_dict(config),
        "inputs": inputs,
        "outputs": outputs,
        "weights": weights,
        "environment": environment(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path | str, stage: str | None = None) -> dict[str, Any]:
    """The manifest of a finished folder.

    Raises:
        InputError: if the folder is missing, unfinished, or was made by another stage.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: has no {MANIFEST}, so the stage that makes it has not finished; run it (again)")
    manifest = read_json(folder / MANIFEST)
    if stage is not None and manifest.get("stage") != stage:
        raise InputError(
            f"{folder}: made by stage {manifest.get('stage')!r}, but a folder of stage {stage!r} is needed"
        )
    return dict(manifest)


def is_finished(folder: Path | str, stage: str, config: Any, inputs: dict[str, str]) -> bool:
    """Whether `folder` already holds the result of exactly this stage, config and inputs.

    Raises:
        InputError: if it holds another result, naming the first key that differs.
    """
    if not (Path(folder) / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    wanted = {"stage": stage, "config": config if isinstance(config, dict) else to_dict(config), "inputs": inputs}
    difference = first_difference({key: manifest.get(key) for key in wanted}, wanted)
    if difference is not None:
        raise InputError(f"{folder} holds another result ({difference}); choose another folder or delete this one")
    return True


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first place where two JSON values differ, as `key: old → new`, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            path = f"{key}.{name}" if key else str(name)
            found = first_difference(old.get(name), new.get(name), path)
            if found is not None:
                return found
        return None
    return None if old == new else f"{key}: {json.dumps(old)} → {json.dumps(new)}"


class MetricsLog:
    """Append-only JSONL: one row per call, flushed, so that a killed run loses nothing it has logged."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, **values: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows (a last line that a kill cut off is left out)."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines if line]

    def cut_after(self, step: int) -> None:
        """Drop the rows of later steps: what a resumed run is about to repeat."""
        kept = [row for row in self.rows() if row.get("step", 0) <= step]
        write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())


def _device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU ({line.partition(':')[2].strip()})"
    except OSError:
        pass
    return f"CPU ({platform.processor() or platform.machine()})"


def _commit() -> str | None:
    """The commit of the checkout that this code runs from; None when it is an installed wheel."""
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=folder, capture_output=True, text=True
        )
    except OSError:
        return None
    return answer.stdout.strip() or None
