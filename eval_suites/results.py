"""One small JSON file a training: all that a study of pretrainings says of it, picture by picture.

Where such a file is, the training is not run again. So the folder can be kept under version control, and a study be spread over
days and machines: weights need not travel.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from clips_core.config import PretrainConfig, what_trains
from clips_core.errors import InputError
from clips_core.folders import MANIFEST, first_difference, read_json, read_manifest, write_bytes
from eval_suites.comparison import DIRECTIONS, query_pictures

WEIGHTS = "export/open_clip/open_clip_model.safetensors"
# Where data lies, and no part of what it is: a result holds on another machine too.
PLACES = (("data", "train"), ("data", "vocab"), ("evaluation", "shards"))


class Point(Protocol):
    """One training of a grid, by what sets it apart from the others."""

    @property
    def name(self) -> str:
        """Of its run folder and of its result."""
        ...

    def _asdict(self) -> dict[str, Any]: ...


def identity(run: PretrainConfig) -> dict[str, Any]:
    """The settings that make a training what it is, without where its data lies."""
    settings = what_trains(run)
    for section, key in PLACES:
        settings[section] = {name: value for name, value in settings[section].items() if name != key}
    return settings


def read_result(folder: Path, point: Point, run: PretrainConfig) -> dict[str, Any] | None:
    """What `write_result` kept of a training, or None if there is nothing.

    Raises:
        InputError: if it was made with other settings.
    """
    path = folder / f"{point.name}.json"
    if not path.is_file():
        return None
    row: dict[str, Any] = read_json(path)
    difference = first_difference(row["settings"], identity(run), "settings")
    if difference is not None:
        raise InputError(f"{path} was made with other settings ({difference}); delete it or name another folder")
    return row


def write_result(folder: Path, row: dict[str, Any]) -> None:
    """Keep a result, whole or not at all."""
    write_bytes(folder / f"{row['point']}.json", json.dumps(row).encode())


def make_result(point: Point, run: PretrainConfig) -> dict[str, Any]:
    """What is kept of a finished training: settings, cost, and R@1 of every held-out picture.

    Raises:
        InputError: if its folder is another stage's or another training's, or holds no evaluation.
    """
    manifest, zero_shot = read_manifest(run.out, "pretrain"), read_json(run.out / "zero_shot.json")
    made_with = identity(TypeAdapter(PretrainConfig).validate_python(manifest["config"]))
    difference = first_difference(made_with, identity(run))
    if difference is not None:
        raise InputError(
            f"{run.out} holds a training with other settings ({difference}); choose another out or delete it"
        )
    outputs, scores = manifest["outputs"], read_scores(run)
    return {
        "point": point.name,
        **point._asdict(),
        "settings": identity(run),
        "inputs": manifest["inputs"],
        "weights": manifest["weights"][WEIGHTS],
        **{name: outputs[name] for name in ("samples", "parameters", "flops_per_sample", "seconds")},
        **{name: zero_shot[name] for name in ("n", "captions", "chance", *DIRECTIONS)},
        "scores": {way: scores[way].tolist() for way in DIRECTIONS},
        "environment": manifest["environment"],
        "finished": manifest["finished"],
    }


def read_scores(run: PretrainConfig) -> dict[str, NDArray[np.float64]]:
    """R@1 of every held-out picture both ways, [N] each, as a finished training evaluated itself.

    The mean over pictures is the R@1 of that way, also where pictures have several captions.

    Raises:
        InputError: if it holds no evaluation, or one that does not say whose each of several captions is.
    """
    path = run.out / "zero_shot.json"
    zero_shot = read_json(path)
    owner = query_pictures(zero_shot, "text_to_image")
    if owner is None:
        raise InputError(
            f"{path}: lacks `owner`, which says whose each of its {zero_shot['captions']} captions is; delete {MANIFEST} beside "
            "it and run the same command to evaluate again"
        )
    return scores_by_picture(zero_shot["ranks"], np.array(owner))


def scores_by_picture(ranks: dict[str, list[int]], owner: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """R@1 of every held-out picture both ways, [N] each.

    Args:
        ranks: of the right answer to every query, 0 best, as `clips_core.zero_shot.retrieval` gives them.
        owner: the picture of each caption, [C]: the queries of one picture's captions rise and fall together.
    """
    hits = {way: (np.asarray(ranks[way]) == 0).astype(float) for way in DIRECTIONS}
    image = hits["image_to_text"]
    text = np.bincount(owner, weights=hits["text_to_image"], minlength=len(image)) * len(image) / len(owner)
    return {"image_to_text": image, "text_to_image": text}
