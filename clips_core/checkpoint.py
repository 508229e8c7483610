"""A run's state: save, and restore the newest whole one, on any number of processes.

A checkpoint is a folder `step-00001000/`: a distributed checkpoint of tensors only (model, optimizer, averaged weights), the
counters as JSON, and a manifest of sizes and hashes that is written last. What has no manifest, or does not match it, does not
count. Every process writes its own part, so that the folder must be one that all of them see.
"""

import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from clips_core.distributed import barrier, from_main, gather_objects, is_main, rank, world_size
from clips_core.errors import InputError
from clips_core.folders import read_json, sha256_file, write_json

_MANIFEST = "checkpoint.json"
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, Any],
    keep: int,
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save under `folder/step-XXXXXXXX`, then delete all but the newest `keep` checkpoints. Called by every process.

    Args:
        counters: JSON-able; the main process's are kept.
        average: further tensors by name (the averaged weights).
    """
    target = folder / f"step-{step:08d}"
    if is_main() and target.exists():  # a save that was cut off, or one that is about to be made again
        shutil.rmtree(target)
    barrier()
    state = _state(model, optimizer, average)
    dcp.save(state, checkpoint_id=target / "tensors", no_dist=world_size() == 1)
    # Each process hashes what it wrote; the main one the metadata too.
    mine = sorted(path for path in target.rglob("*") if path.is_file() and _writer(path) == rank())
    hashes = {str(path.relative_to(target)): [path.stat().st_size, sha256_file(path)] for path in mine}
    files = {name: value for part in gather_objects(hashes) for name, value in part.items()}
    if is_main():
        write_json(target / _MANIFEST, {"step": step, "counters": counters, "files": files})
        for old in _folders(folder)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return target


def load_latest(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None = None
) -> tuple[int, dict[str, Any]] | None:
    """Restore the newest whole checkpoint in place; a damaged one is passed over with a warning. Called by every process.

    Returns:
        Its step and counters, or None where there is none.

    Raises:
        InputError: if it belongs to another model or lacks the averaged weights.
    """
    candidate = from_main(_newest_whole(folder) if is_main() else None)
    if candidate is None:
        return None
    state = _state(model, optimizer, average)
    try:
        # The metadata is a pickle; it is read only after its hash was seen to be the one that this program wrote.
        dcp.load(state, checkpoint_id=candidate / "tensors", no_dist=world_size() == 1)
    except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"checkpoint {candidate} does not fit this run's model and optimizer ({str(error).strip().splitlines()[-1]}); "
            "delete the run's folder or choose another"
        ) from None
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    manifest = read_json(candidate / _MANIFEST)
    return manifest["step"], manifest["counters"]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, **({"average": dict(average)} if average else {})}


def _writer(path: Path) -> int:
    """Which process wrote a file of a distributed checkpoint (`__RANK_NUMBER.distcp`)."""
    return int(path.name.split("_")[2]) if path.suffix == ".distcp" else 0


def _newest_whole(folder: Path) -> Path | None:
    for candidate in reversed(_folders(folder)):
        problem = _problem(candidate)
        if problem is None:
            return candidate
        print(f"warning: checkpoint {candidate} is passed over: {problem}", file=sys.stderr)
    return None


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _problem(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from counting."""
    if not (checkpoint / _MANIFEST).is_file():
        return "it was never finished"
    for name, (size, digest) in read_json(checkpoint / _MANIFEST)["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or sha256_file(path) != digest:
            return f"{name} is damaged"
    return None
