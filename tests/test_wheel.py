"""The wheel, built and installed elsewhere: it holds its data files, and the command works without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("clips_core", "llava_bridge", "eval_suites")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that knows nothing of the checkout; its output."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays as it is, and with the setuptools that is here: no network."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source, cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_it_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        metadata = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if "__pycache__" not in path.parts]
    assert names == {path.relative_to(ROOT).as_posix() for path in paths if path.is_file()}
    wanted = ["clips_core/bert_vocab.txt", *(f"{package}/py.typed" for package in PACKAGES)]
    assert names.issuperset(wanted)
    for folder in ("clips_core/recipes/paper", "llava_bridge/recipes", "eval_suites/recipes", "eval_suites/suites"):
        assert any(name.startswith(folder) and name.endswith(".yaml") for name in names), folder
    requirements = [line.lower() for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert not any(heavy in line for line in requirements for heavy in ("lmms", "smollm2", "deepspeed", "llava"))


def test_the_command_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """In a virtual environment of its own, which sees the libraries that are installed here but not the checkout."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel, cwd=tmp_path)
    # A path that comes from a .pth is not searched for .pth files in turn: the checkout's editable install stays out.
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=elsewhere).strip())
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    for name in PACKAGES:
        code = f"import {name}; print({name}.__file__)"
        assert Path(run(python, "-c", code, cwd=elsewhere).strip()).is_relative_to(environment)
    text = run(environment / "bin" / "clips-llava", "--help", cwd=elsewhere)
    for stage in ("data", "pretrain", "align", "tune", "eval", "compare", "study", "plan", "demo"):
        assert stage in text
