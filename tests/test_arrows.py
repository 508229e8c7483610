"""Imports go one way, scripts → eval_suites → llava_bridge → clips_core, and nothing runs code that came as data.

Held over the syntax trees, so imports inside functions count too.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROWS = ("clips_core", "llava_bridge", "eval_suites", "scripts")  # each may import itself and what stands before it
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


FILES = [path for folder in ARROWS for path in sources(folder)]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import, wherever it stands; `import_module("…")` counts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*base, *filter(None, [node.module])])
        elif isinstance(node, ast.Call) and called(node) in ("importlib.import_module", "import_module", "__import__"):
            name = node.args[0] if node.args else None
            yield node.lineno, name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else "?"


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def faults(text: str, package: str) -> list[str]:
    """What a file of `package` (dotted) does that it must not, one line each."""
    tree = ast.parse(text)
    folder = package.split(".")[0]
    allowed = ARROWS[: ARROWS.index(folder) + 1]
    found = []
    for line, module in imported_modules(tree, package):
        top = module.split(".")[0]
        if top in ARROWS and top not in allowed:
            found.append(f"line {line}: {folder} must not import {module}")
        if top == "tests":
            found.append(f"line {line}: nothing imports from tests")
        if top in UNPICKLERS:
            found.append(f"line {line}: {module} runs code that comes as data")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if keywords.get("trust_remote_code", "False") != "False":
            found.append(f"line {node.lineno}: trust_remote_code runs code that comes with weights")
        if called(node) == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if called(node) in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
            found.append(f"line {node.lineno}: {called(node)} with allow_pickle")
        if called(node) in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(f"line {node.lineno}: {called(node)}; use yaml.safe_load")
    return found


def test_the_packages_are_there() -> None:
    assert all(sources(folder) for folder in ARROWS[:3])


@each_file
def test_file_keeps_the_rules(path: Path) -> None:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert faults(path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize(
    ("text", "package", "fault"),
    [
        ("import llava_bridge.train", "clips_core", "must not import llava_bridge.train"),
        ("def f():\n    from eval_suites import cli", "llava_bridge", "must not import eval_suites"),
        ("from ...eval_suites import cli", "llava_bridge.recipes", "must not import eval_suites"),
        ("import importlib\nimportlib.import_module('scripts.bench')", "eval_suites", "must not import scripts.bench"),
        ("from tests.conftest import x", "scripts", "nothing imports from tests"),
        ("import pickle", "clips_core", "runs code"),
        ("torch.load(path)", "clips_core", "weights_only"),
        ("torch.load(path, weights_only=False)", "clips_core", "weights_only"),
        ("np.load(path, allow_pickle=True)", "clips_core", "allow_pickle"),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", "llava_bridge", "trust_remote_code"),
        ("AutoModel.from_pretrained(x, trust_remote_code=flag)", "llava_bridge", "trust_remote_code"),
        ("yaml.load(text, Loader=yaml.Loader)", "clips_core", "safe_load"),
    ],
)
def test_the_rules_see_faults(text: str, package: str, fault: str) -> None:
    assert len(found := faults(text, package)) == 1 and fault in found[0]


def test_the_rules_allow_what_is_right() -> None:
    text = "import torch\nfrom clips_core import errors\ntorch.load(path, weights_only=True)\nyaml.safe_load(text)"
    assert faults(text, "eval_suites") == []


def test_what_the_packages_import_is_declared() -> None:
    """An import at the top of a file needs a line in pyproject.toml or, for heavy ones, in requirements/."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in ("eval.txt", "nodeps.txt"):
        declared += [line for line in (ROOT / "requirements" / name).read_text().splitlines() if line[:1].isalnum()]
    names = {distribution_name(re.split(r"[<>=!~\[; ]", line)[0]) for line in declared}
    distributions = packages_distributions()
    for path in (path for folder in ARROWS[:3] for path in sources(folder)):
        top = ast.Module([node for node in ast.parse(path.read_text()).body if not isinstance(node, DEFINITIONS)], [])
        for line, module in imported_modules(top, package=".".join(path.relative_to(ROOT).parent.parts)):
            name = module.split(".")[0]
            if name not in sys.stdlib_module_names and name not in ARROWS:
                candidates = {distribution_name(distribution) for distribution in distributions.get(name, [name])}
                assert candidates & names, f"{path.relative_to(ROOT)}, line {line}: {name} is not declared"


def distribution_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_config_needs_no_torch() -> None:
    """In a fresh interpreter: reading a recipe must not cost the seconds that importing torch takes."""
    heavy = ("torch", "transformers", "open_clip", "torchvision")
    code = f"import sys, clips_core.config; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr
