"""The original LLaVA in a virtual environment of its own, made once per set of pins and kept."""

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from llava_bridge.llm import default_cache

ROOT = Path(__file__).parents[1]
PINS = ROOT / "requirements" / "original_llava.txt"


def original_python() -> Path:
    """The interpreter of that environment. Installing takes about a minute; the folder appears when it is whole."""
    lent = {name: importlib.metadata.version(name) for name in ("torch", "pillow")}
    versions = f"{sys.version} {lent} from {sysconfig.get_path('platlib')}"
    digest = hashlib.sha256(PINS.read_bytes() + Path(__file__).read_bytes() + versions.encode()).hexdigest()
    folder = default_cache() / "venvs" / f"original-llava-{digest[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / ".lock", "w") as lock:  # two test runs must not both install
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                _make(temporary)
                temporary.rename(folder)  # an environment can be moved as long as its scripts are not used
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder / "bin" / "python"


def _make(folder: Path) -> None:
    _run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
    _run(python, *pip, "-r", PINS)
    packages = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    _link(packages)
    _run(python, "-c", "import torch, llava; from llava.train import train")


def _link(packages: Path) -> None:
    """Lend torch and what it needs from this environment: gigabytes that need not be fetched and stored again.

    Pillow too: versions 11 and 13 do not resize alike, and the pixels are to be compared to the last bit.
    """
    names, seen = ["torch", "pillow"], set()
    while names:
        distribution = importlib.metadata.distribution(names.pop())
        if distribution.name in seen:
            continue
        seen.add(distribution.name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            source, link = Path(str(distribution.locate_file(top))), packages / top
            if source.exists() and not link.exists():
                link.symlink_to(source)
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.append(requirement.name)


def run_original(python: Path, script: str, *arguments: str | Path, before: str = "", timeout: float = 900) -> str:
    """Run one of the scripts beside this file, which sees of this project nothing but llava_bridge/upstream.py.

    Args:
        script: its name, or -m and a module.
        before: a folder of packages that come before the installed ones.

    Returns:
        what it printed, warnings included.
    """
    with tempfile.TemporaryDirectory(prefix="clips-llava-upstream-") as temporary:
        package = Path(temporary) / "llava_bridge"
        package.mkdir()
        for name in ("__init__.py", "upstream.py"):
            shutil.copy(ROOT / "llava_bridge" / name, package / name)
        path = os.pathsep.join(filter(None, [temporary, before]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        what = script.split() if script.startswith("-m ") else [ROOT / "tests" / script]
        return _run(python, *what, *arguments, environment=environment, timeout=timeout)


def _run(*command: str | Path, environment: dict[str, str] | None = None, timeout: float = 900) -> str:
    if environment is None:
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        [*map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-6000:]}"
    return result.stdout
