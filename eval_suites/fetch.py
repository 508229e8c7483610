"""A suite's files: fetched from the hub where there is a network, and looked through before they are used where there is none.

A data folder mirrors the hub, so it can be copied to a machine without a network as it is. Only the parquet files of the splits
that the suite's tasks read are fetched, at the revisions that the suite pins, or else at the newest ones; which these were stands
in `fetched.json`, and a fetch into the same folder goes on with the same.
"""

import fnmatch
import glob
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from clips_core.errors import InputError
from clips_core.folders import read_json, write_json
from eval_suites.benchmarks import load_suite, question_faults
from eval_suites.local_data import Found, Table, faults, find_all, fingerprint, wrong_counts
from eval_suites.needs import unmet

RECORD = "fetched.json"  # in the data folder: repository → revision


@dataclass(frozen=True)
class Checked:
    """A task whose files are all there and whole."""

    task: str
    questions: int
    size: int  # bytes, of all of its files
    fingerprint: str


def fetch_suite(name: str, folder: Path, endpoint: str | None = None) -> list[Checked]:
    """Fetch a suite's files into `folder` and look through them; files that are there already are kept.

    Args:
        name: of a suite that comes with the package, or a YAML file.
        endpoint: address of the hub; None: the one that huggingface_hub is set to.

    Raises:
        InputError: if the hub can't be reached, lacks something or refuses it, the disk is too small, or what was fetched is not
            what the suite speaks of.
    """
    suite = load_suite(name)
    by_repository: dict[str, list[Table]] = {}
    for task in suite.tasks.values():
        for table in task.tables:
            by_repository.setdefault(table.repository, []).append(table)
    folder.mkdir(parents=True, exist_ok=True)
    for repository, tables in by_repository.items():
        _fetch(repository, tables, folder, endpoint)
    return check_suite(name, folder)


def check_suite(name: str, folder: Path) -> list[Checked]:
    """Look through a suite's files: columns, published numbers of rows, every picture, what the tasks' scoring needs.

    Raises:
        InputError: with everything that is missing or wrong, one fault a line.
    """
    suite = load_suite(name)
    checked, wrong = [], []
    for task_name, task in suite.tasks.items():
        found, missing = find_all(folder, task.tables)
        own = [*missing, *unmet(task.needs)]
        if missing:  # then nobody can say what the others should cover
            found = [replace(own_table, table=replace(own_table.table, covers={})) for own_table in found]
        own += [*faults(found), *wrong_counts(found)]
        if not own:
            own += question_faults(task, found[0])
        wrong += own
        if not own:
            checked.append(_checked(task_name, folder, found))
    if wrong := list(dict.fromkeys(wrong)):  # tasks may share a file
        number = f"{len(wrong)} faults" if len(wrong) > 1 else "1 fault"
        raise InputError("\n".join([f"suite {suite.name} in {folder}: {number}", *(f"- {fault}" for fault in wrong)]))
    return checked


def table_of(checked: Iterable[Checked]) -> str:
    """The checked tasks as lines for the terminal."""
    lines = [
        f"{row.task:20} {row.questions:>9,} questions {row.size / 1e6:>11,.1f} MB  {row.fingerprint[:12]}"
        for row in checked
    ]
    return "\n".join(lines)


def _checked(task: str, folder: Path, found: Sequence[Found]) -> Checked:
    size = sum(file.stat().st_size for table in found for file in table.files)
    return Checked(task, found[0].rows, size, fingerprint(folder, list(found)))


# ---------------------------------------------------------------------------------------------------------------- from the hub


def _fetch(repository: str, tables: Sequence[Table], folder: Path, endpoint: str | None) -> None:
    """The files of one data set's tables, and its README, which says which file is which split."""
    import httpx2  # what huggingface_hub asks by; its own errors for an answer of the hub are kinds of OSError
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    pinned = {table.revision for table in tables if table.revision is not None}
    if len(pinned) > 1:
        raise InputError(
            f"{repository}: the suite pins several revisions ({', '.join(sorted(pinned))}): a folder holds one"
        )
    place = folder / repository
    try:
        api = HfApi(endpoint=endpoint)
        revision = pinned.pop() if pinned else record.get(repository)
        revision = api.dataset_info(repository, revision=revision).sha
        assert revision is not None
        write_json(folder / RECORD, {**record, repository: revision})
        tree = api.list_repo_tree(repository, repo_type="dataset", revision=revision, recursive=True)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
        common: dict[str, Any] = {
            "repo_type": "dataset",
            "revision": revision,
            "local_dir": place,
            "endpoint": endpoint,
        }
        readme = "README.md" in sizes
        if readme:
            hf_hub_download(repository, "README.md", **common)
        told = front_matter((place / "README.md").read_text(encoding="utf-8")) if readme else {}
        wanted = sorted({path for table in tables for path in files_of(table, told, list(sizes))})
        _check_room(folder, repository, sum(sizes[path] for path in wanted if not (place / path).is_file()))
        names = [*wanted, *(["README.md"] if readme else [])]
        snapshot_download(repository, allow_patterns=[glob.escape(name) for name in names], **common)
    except (httpx2.HTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        told_by = " ".join(str(error).split())[:300]
        raise InputError(
            f"{repository}: not to be had from the hub ({told_by}); run the same command again to go on. A data set behind a form"
            " needs its terms accepted on its page and `hf auth login`"
        ) from None


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes."""
    if not text.startswith("---"):
        return {}
    try:
        values = yaml.safe_load(text[3:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def files_of(table: Table, readme: Mapping[str, Any], paths: Sequence[str]) -> list[str]:
    """Those of a data set's parquet files that hold the table: by the README's `configs`, else by the usual names.

    Raises:
        InputError: if there is none.
    """
    wanted = table.configuration or "default"
    parquet = [path for path in paths if path.endswith(".parquet")]
    patterns: list[str] = []
    for config in readme.get("configs") or ():
        if config.get("config_name", "default") == wanted:
            for entry in config.get("data_files") or ():
                if isinstance(entry, dict) and entry.get("split") == table.split:
                    path = entry.get("path", ())
                    patterns += [path] if isinstance(path, str) else list(path)
    if not patterns:
        folder = "data" if wanted == "default" else wanted
        patterns = [f"{folder}/{table.split}-*.parquet", f"{folder}/{table.split}.parquet", f"{table.split}-*.parquet"]
    found = [path for path in parquet if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]
    if not found:
        raise InputError(
            f"{table.repository}: no parquet file for configuration {wanted!r}, split {table.split!r} (it has:"
            f" {', '.join(parquet[:6]) or 'no parquet file at all'})"
        )
    return found


def _check_room(folder: Path, repository: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{repository}: {needed / 1e9:.1f} GB are to be fetched, but {folder} has room for {free / 1e9:.1f} GB"
        )
