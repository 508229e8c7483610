"""A finished training as one JSON file, without its weights: all that a comparison reads of its folders.

Such files are small enough for version control. From them a study goes on elsewhere: no finished training is run again.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from clips_core.errors import InputError
from clips_core.folders import first_difference, read_json, write_bytes, write_json
from eval_suites.records import PICTURES, Entry

# Of each stage's folder: what `read_run` and `fairness` read.
STAGE_FILES = (
    "manifest.json",
    "metrics.jsonl",
    "zero_shot.json",
    "results.json",
    "model/config.json",
    "model/processor_config.json",
)


def training_files(entry: Entry) -> Iterator[tuple[str, Path]]:
    """Everything that a comparison reads of a training: `align/manifest.json`, `eval/real/pope.jsonl`, …, and where it lies."""
    places = {"align": entry.align, "tune": entry.tune, **{f"eval/{name}": getattr(entry, name) for name in PICTURES}}
    for place, folder in {**places, "tower": entry.tower}.items():
        if folder is None:
            continue
        answers = set(folder.glob("*.jsonl")) if place.startswith("eval/") else set()
        for file in sorted({folder / name for name in STAGE_FILES} | answers):
            if file.is_file() and not file.name.startswith("answers-"):
                yield f"{place}/{file.relative_to(folder).as_posix()}", file


def keep(path: Path, study: Path, entry: Entry, settings: Mapping[str, Any]) -> None:
    """Write a finished training to `path`.

    Args:
        study: the study's folder; the training lies in its `NAME/seedS`, and its tower's pretraining there or in `NAME/tower`.
        settings: what the training is one of.
    """
    own = entry.tower is not None and (study / entry.name / f"seed{entry.seed}" / "tower").exists()
    files = {}
    for name, file in training_files(entry):
        root = entry.name if name.startswith("tower/") and not own else f"{entry.name}/seed{entry.seed}"
        files[f"{root}/{name}"] = file.read_text(encoding="utf-8")
    write_json(path, {"settings": dict(settings), "files": files})


def restore(path: Path, study: Path, settings: Mapping[str, Any]) -> None:
    """Write a kept training's files into the study's folder, those that are not there.

    Raises:
        InputError: if it is a training with other settings, or one of its names leads out of the folder.
    """
    kept = read_json(path)
    difference = first_difference(kept["settings"], dict(settings), "settings")
    if difference is not None:
        raise InputError(f"{path} was made with other settings ({difference}); delete it or name another folder")
    for name, text in kept["files"].items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise InputError(f"{path}: {name!r} would lie outside the study's folder")
        target = study / relative
        if not target.exists():
            write_bytes(target, text.encode())
