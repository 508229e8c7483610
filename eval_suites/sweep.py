"""A learning rate of its own for each tower: short trials of stage 1, compared on conversations that none of them saw."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

import llava_bridge
from clips_core.config import FORBID, load_config, recipe_path, to_dict
from clips_core.errors import InputError
from clips_core.folders import MANIFEST, claimed, first_difference, read_json, sha256_file, write_json
from eval_suites.grid import leaves, settings_of, written
from eval_suites.steps import OWN_KEYS, Command, launcher, run_step
from llava_bridge.config import AlignConfig
from llava_bridge.records import read_records


@dataclass(config=FORBID)
class SweepConfig:
    """Trials of stage 1 for each tower before the study, so that no tower is judged at a learning rate that suits another."""

    rates: list[float]  # learning rates; the same for all towers
    samples: int  # that each trial sees
    held_out: int = 1000  # conversations of stage 1's data that no trial sees, and on which the trials are compared

    def __post_init__(self) -> None:
        if len(self.rates) < 2 or len(set(self.rates)) < len(self.rates):
            raise ValueError("rates must be two or more, each once")
        if self.samples < 1 or self.held_out < 1:
            raise ValueError("samples and held_out must be at least 1")


def trials(
    sweep: SweepConfig, align: Mapping[str, Any], own: Mapping[str, Any], out: Path, tower: str, gpus: int
) -> dict[float, list[Command]]:
    """By learning rate: a short stage 1, and its loss on held-out conversations.

    Args:
        align: the study's keys of `clips-llava align`.
        own: those of this tower, its spec and the seed among them.
        out: the study's folder; trials lie in `out`/`tower`/sweep.
    """
    found = {}
    for rate in sweep.rates:
        folder = out / tower / "sweep" / f"{rate:g}"
        trial = {"learning_rate": rate, "samples": sweep.samples, "data": {"json": str(out / "sweep" / "train.json")}}
        recipes, settings = settings_of("align", align, {**own, **trial, "out": str(folder / "align")}, OWN_KEYS)
        data = {**to_dict(_align_config(recipes, settings).data), "json": str(out / "sweep" / "held_out.json")}
        asked = {"model": str(folder / "align"), "data": data, "out": str(folder / "held_out.json")}
        start, loss = (
            [*launcher(gpus), "-m", "eval_suites.cli"],
            [f"{name}={written(value)}" for name, value in leaves(asked)],
        )
        found[rate] = [
            Command([*start, "align", *recipes, *settings], folder / "align" / MANIFEST),
            Command([*launcher(1), "-m", "eval_suites.cli", "eval", "loss", *loss], folder / "held_out.json"),
        ]
    return found


def _align_config(recipes: Sequence[str], settings: Sequence[str]) -> AlignConfig:
    bridge = Path(llava_bridge.__file__).parent
    return load_config(AlignConfig, [recipe_path(bridge, name) for name in recipes], settings)


def best_rate(
    sweep: SweepConfig, align: Mapping[str, Any], own: Mapping[str, Any], out: Path, tower: str, gpus: int
) -> float:
    """The learning rate of the trial with the lowest held-out loss; trials that are not finished are run."""
    of_tower = trials(sweep, align, own, out, tower, gpus)
    with claimed(out / "sweep", wait=True):
        split_conversations(sweep, align, out)
    with claimed(out / tower / "sweep", wait=True):
        for rate, steps in of_tower.items():
            for step in steps:
                if not step.finished.exists():
                    print(f"\nsweep, {tower}, learning rate {rate:g}\n$ {step}", flush=True)
                    run_step(step)
    losses = {rate: read_json(steps[1].finished)["loss"] for rate, steps in of_tower.items()}
    best = min(losses, key=lambda rate: losses[rate])
    told = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
    print(f"{tower}: stage 1 learns at {best:g} (held-out loss a token: {told})", flush=True)
    if best in (min(losses), max(losses)):
        print(f"{tower}: {best:g} is at the sweep's end; a wider sweep may find a better one", flush=True)
    return best


def split_conversations(sweep: SweepConfig, align: Mapping[str, Any], out: Path) -> None:
    """Stage 1's conversations → `out`/sweep/train.json and held_out.json, drawn at random, the same for all towers.

    Raises:
        InputError: if there are too few, or the folder was made of others.
    """
    recipes, settings = settings_of("align", align, {"tower": "-", "out": "-"}, OWN_KEYS)
    source = _align_config(recipes, settings).data.json
    made = out / "sweep" / "split.json"
    identity = {"data": sha256_file(source), "held_out": sweep.held_out}
    if made.is_file():
        difference = first_difference(read_json(made), identity)
        if difference is not None:
            raise InputError(
                f"{made.parent} was made of other data ({difference}); delete it, and every tower's sweep folder"
            )
        return
    records = [record.value for record in read_records(source)]
    if len(records) <= sweep.held_out:
        raise InputError(
            f"{source}: has {len(records)} conversations, of which sweep.held_out={sweep.held_out} leaves none"
        )
    order = np.random.default_rng(0).permutation(len(records)).tolist()
    parts = {"held_out": order[: sweep.held_out], "train": sorted(order[sweep.held_out :])}
    for name, numbers in parts.items():
        write_json(out / "sweep" / f"{name}.json", [records[number] for number in numbers])
    write_json(made, identity)
