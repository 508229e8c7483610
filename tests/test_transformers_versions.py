"""The bridge with the oldest and the newest transformers that it supports: its own tests, run in each."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[1]
TESTS = ("test_towers", "test_conversations", "test_batching", "test_lm_loss", "test_mllm", "test_llms", "test_anyres")

pytestmark = pytest.mark.slow


def required() -> str:
    """The oldest version that pyproject.toml allows."""
    (found,) = re.findall(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return f"{found}.0" if found.count(".") == 1 else found


def pinned() -> str:
    """The newest version that is tested: the one that `make install` installs."""
    (found,) = re.findall(r"^transformers==([\d.]+)$", (ROOT / "requirements" / "constraints.txt").read_text(), re.M)
    return found


def run(*command: str | Path, timeout: int) -> str:
    result = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result.stdout


def environment(folder: Path, version: str) -> Path:
    """A Python that sees all that is installed here, but for transformers and whatever that version wants otherwise."""
    run(sys.executable, "-m", "venv", folder, timeout=120)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", timeout=60).strip())
    # Behind the environment's own packages, which therefore win; pip takes what is there for installed.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "installed_here.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in here))
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"transformers=={version}", timeout=600)
    return python


@pytest.mark.parametrize("version", [required(), pinned()])
def test_the_bridges_tests_pass(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it would come before the environment's own packages
    python = Path(sys.executable) if version == transformers.__version__ else environment(tmp_path / version, version)
    assert run(python, "-c", "import transformers; print(transformers.__version__)", timeout=120).strip() == version
    files = [f"tests/{name}.py" for name in TESTS]
    options = ("-q", "-m", "not slow", "-p", "no:cacheprovider", "--basetemp", tmp_path / "tests")
    print(run(python, "-m", "pytest", *options, *files, timeout=1800)[-300:])
