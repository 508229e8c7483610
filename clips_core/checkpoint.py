"""A run's state: save, and restore the newest whole one.

A checkpoint is a folder `step-00001000/`: a distributed checkpoint of tensors only (model and optimizer), the counters as JSON,
and a manifest of sizes and hashes that is written last. What has no manifest, or does not match it, does not count.
"""

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from clips_core.folders import read_json, sha256_file, write_json

_MANIFEST = "checkpoint.json"
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, counters: dict[str, Any], keep: int
) -> Path:
    """Save under `folder/step-XXXXXXXX`, then delete all but the newest `keep` checkpoints."""
    target = folder / f"step-{step:08d}"
    if target.exists():  # a save that was cut off, or one that is about to be made again
        shutil.rmtree(target)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=target / "tensors", no_dist=True)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(target)): [path.stat().st_size, sha256_file(path)] for path in files}
    write_json(target / _MANIFEST, {"step": step, "counters": counters, "files": hashes})
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_latest(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]] | None:
    """Restore the newest whole checkpoint in place; a damaged one is passed over with a warning.

    Returns:
        Its step and counters, or None where there is none.
    """
    for candidate in reversed(_folders(folder)):
        problem = _problem(candidate)
        if problem is not None:
            print(f"warning: checkpoint {candidate} is passed over: {problem}", file=sys.stderr)
            continue
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        # The metadata is a pickle; it is read only after its hash was seen to be the one that this program wrote.
        dcp.load(state, checkpoint_id=candidate / "tensors", no_dist=True)
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        manifest = read_json(candidate / _MANIFEST)
        return manifest["step"], manifest["counters"]
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
